"""What a pass does inside: queries, keys, values, head outputs and weights, for whoever listens to it.

Shapes: b batch, h query heads, g key/value heads, n queries, m keys, d and e features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Inner(NamedTuple):
    """query [b, h, n, d], key [b, g, m, d], value [b, g, m, e], output [b, h, n, e]: what the heads read and give,
    before anything joins them. weights: [b, h, n, m], None where the pass made none. where: which queries meet which
    keys, or that as a mask [b or 1, 1 or h, n, m], True = may attend; None where all meet all."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    weights: Tensor | None
    where: Any


# Gives the head outputs with which the pass goes on.
Listener = Callable[[Inner], Tensor]
