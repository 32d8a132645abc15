"""Efficient attention: neither a key nor a value projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.passes import attend_where, joined
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class EfficientSlices(Mechanism):
    """Keys and values are both slices of the tokens: half the parameters of multi-head attention, half its state.

        head i = softmax((x W_q^i) x_i^T / sqrt(d)) x_i,   x_i = x[:, i d : (i + 1) d],   output = concat(heads) W_o

    With heads=1 it is softmax(x W_q x^T / sqrt(dim)) x W_o, the single-head form of the paper's later version; slices
    per head are those of its first. The state holds each token once, as key and value.
    Source: Hosseini and Hosseini, You Need to Pay Better Attention, arXiv:2403.01643, there "Efficient Attention" (not
    the linear attention of that name, arXiv:1812.01243).
    """

    card = Card(
        name="efficient-slices",
        title="You Need to Pay Better Attention (Efficient Attention)",
        reference="arXiv:2403.01643",
        family=Family.PROJECTION,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2",
        state="n / 2",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.scale = self._split_heads() ** -0.5
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, need = self._split(self.q_proj(x)), call.need_weights
        seen: Any
        if context is None:
            seen, (tokens,) = joined(call, x, self.causal, tokens=self._split(x))
            mixed, weights = attend_where(q, tokens, tokens, seen, scale=self.scale, need_weights=need)
        else:
            if call.state is not None:
                call.state.advance(x.shape[1])
            seen = call.dense if call.padding is None else call.padding[:, None, None]
            tokens = self._split(context)
            mixed, weights = attend_weighted(q, tokens, tokens, seen, scale=self.scale, need_weights=need)
        mixed = self.offered(q, tokens, tokens, mixed, weights, seen)
        return Result(self.o_proj(mixed.transpose(1, 2).flatten(-2)), weights)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
