"""Aaren: attention as a recurrent network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.linear import allowed_pairs, checked_chunk, hide, needs_matrix, widen
from manyheads.functional.prefix import CHUNK, Prefix, prefix_softmax
from manyheads.inner import Across
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class Aaren(Mechanism):
    """Softmax attention with a learned query, the same at every position, so that a state of fixed size updates it.

        softmax over j <= i of (q_h . k_j / sqrt(d)) v_j, summed over j, per head h

    State: (maximum, numerator, denominator) of the running softmax, d + 2 numbers per head. The paper scans tokens in
    parallel; here `chunk` tokens are computed at once, each chunk on the state of those before.
    Source: Feng et al., Attention as an RNN, arXiv:2405.13956. The paper learns one token per layer and projects it
    as transformers project queries; the projected query of each head is learned here directly, which gives the same
    functions with dim^2 parameters fewer. 1 / sqrt(d) and an output projection are as in multi-head attention.
    """

    card = Card(
        name="aaren",
        title="Attention as an RNN",
        reference="arXiv:2405.13956",
        family=Family.RECURRENT,
        patterns={"causal-self"},
        time="n",
        state="1",
        parallel="ring",
        example={"chunk": 4},
        notes="Its query does not depend on the input. With a state, neither dense masks nor weights reach back to "
        "earlier passes. No lookup by content, since the query does not depend on the input: 12% on quick "
        "recall, 13% in five times the steps.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = True, chunk: int = CHUNK, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        self.chunk = checked_chunk(self.card.name, chunk)
        self.query = nn.Parameter(torch.randn(heads, self.head_dim))
        self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))

    def attend(self, x: Tensor, context: Tensor | None, call: Call) -> Result:
        if call.across is not None:
            return Result(self.o_proj(self._of_all(x, call.across)))
        matrix = needs_matrix(self.card.name, seen=call.seen, dense=call.dense, need_weights=call.need_weights)
        query, k, v = (widen(t) for t in (self.query, self._heads(self.k_proj(x)), self._heads(self.v_proj(x))))
        v = hide(v, call.padding)
        scores = (k @ query[..., None]).squeeze(-1) * self.head_dim**-0.5
        mixed = self._scan(scores, v, call)
        weights = None
        if matrix:
            allowed = allowed_pairs(k, k, causal=True, padding=call.padding, dense=call.dense)
            weights = masked_softmax(scores[:, :, None].expand(-1, -1, x.shape[1], -1), allowed)
            mixed = weights @ v
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2).to(x.dtype))
        return Result(output, weights.to(x.dtype) if call.need_weights and weights is not None else None)

    def _scan(self, scores: Tensor, v: Tensor, call: Call) -> Tensor:
        state = call.state
        before = None if state is None or not state.fixed else Prefix(**state.fixed)
        if call.padding is not None:
            scores = scores.masked_fill(~call.padding[:, None], -torch.inf)
        mixed, after = prefix_softmax(scores, v, before, chunk=self.chunk)
        if state is not None:
            state.fixed.update(after._asdict())
            state.advance(v.shape[2])
        return mixed

    def _of_all(self, x: Tensor, across: Across) -> Tensor:
        """Softmax attention in which every token asks the same, over the tokens of all processes."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        query = self.query.to(k.dtype)[None, :, None].expand_as(k)
        mixed = across.attend(query, k, v, scale=self.head_dim**-0.5, windows=None)
        return mixed.transpose(1, 2).flatten(-2).to(x.dtype)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
