"""What a pass does inside: queries, keys, values, head outputs and weights, for whoever listens to it.

Shapes: b batch, h query heads, g key/value heads, n queries, m keys, d and e features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Inner(NamedTuple):
    """query [b, h, n, d], key [b, g, m, d], value [b, g, m, e], output [b, h, n, e]: what the heads read and give,
    before anything joins them. weights: [b, h, n, m], None where the pass made none. where: which queries meet which
    keys, or that as a mask [b or 1, 1 or h, n, m], True = may attend; None where all meet all. An output that is no
    tensor yet is made by calling it, once and while the pass lasts, or not at all where another takes its place."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor | Callable[[], Tensor]
    weights: Tensor | None
    where: Any


# Gives the head outputs with which the pass goes on.
Listener = Callable[[Inner], Tensor]


class Across(Protocol):
    """The tokens of a sequence that other processes hold, for a pass over one's own: what is given and comes back is of
    these alone. All processes ask alike."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, windows: Sequence[int] | None) -> Tensor:
        """Softmax attention over the whole sequence; of each head, where windows are given, over its newest tokens."""

    def recall(self, q: Tensor, k: Tensor, v: Tensor, kernel: Any, *, causal: bool, slopes: Tensor | None) -> Tensor:
        """Linear attention over it, by a kernel of `functional.linear`."""

    def before(self, x: Tensor, count: int) -> Tensor:
        """[b, count, ...]: the rows of x [b, n, ...] that stand before one's first token, zeros where there is none."""

    def sums(self, x: Tensor, *, causal: bool) -> Tensor:
        """Of x [b, ...], a sum over one's own tokens: that over all before them if causal, else over all there are. No
        gradient passes."""
