"""Optimised attention: no value projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class Optimised(SoftmaxAttention):
    """Values are slices of the tokens: the output projection can do what a value projection did. 3/4 of the parameters.

        head i = softmax((x W_q^i) (x W_k^i)^T / sqrt(d)) x[:, i d : (i + 1) d],   output = concat(heads) W_o

    Source: Hosseini and Hosseini, You Need to Pay Better Attention, arXiv:2403.01643. The paper's other two mechanisms
    are `efficient-slices` (no key projection either) and `super`.
    """

    card = Card(
        name="optimised",
        title="You Need to Pay Better Attention (Optimised Attention)",
        reference="arXiv:2403.01643",
        family=Family.PROJECTION,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2",
        state="n",
        parallel="ring",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        del self.v_proj

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.q_proj(x), self.k_proj(source)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, source))
