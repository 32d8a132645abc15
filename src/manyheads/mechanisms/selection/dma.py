"""Dynamic mask attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.rotary import Rotary, rotate
from manyheads.functional.running import CHUNK, Held, after_chunk, nothing_held, running_top
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class DMA(Mechanism):
    """Values say how much a token matters; a query attends to the `window` tokens so far that matter most.

        delta_j = A_g softplus(W_g v_j)  (v_j of all heads) per key/value head g
        softmax(q_i . k_j / sqrt(d) + delta_j) v_j, over the `window` tokens j <= i of largest delta_j

    The choice has no gradient; W and A learn through delta in the scores. It does not depend on the query, so that a
    token once pushed out stays out: the state holds `window` tokens per key/value head and no more. Equal deltas: the
    newer token wins, so that with A = 0, as it starts, this is a sliding window.

    Source: arXiv:2508.02124 and its released code, which leaves equal deltas to the sort. exponential: exp(delta_j) in
    the scores, over the same tokens, as in some versions of them and in the Doge models of transformers (whose query
    and key norms are theirs); the newest code is without it. Cut off at exp(30), lest it overflow.
    """

    card = Card(
        name="dma",
        title="Trainable Dynamic Mask Sparse Attention",
        reference="arXiv:2508.02124",
        family=Family.SELECTION,
        patterns={"causal-self"},
        time="n w",
        state="w",
        example={"window": 4, "kv_heads": 2},
        notes="Up to `window` tokens it is attention to all of them, with a bias per key.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 256,
        kv_heads: int | None = None,
        exponential: bool = False,
        causal: bool = True,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = d = self._split_heads()
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"{self.card.name}: heads={heads} is not a multiple of kv_heads={kv_heads}")
        if window < 1:
            raise ValueError(f"{self.card.name}: window={window} must be positive")
        self.window, self.scale, self.rotary = window, d**-0.5, Rotary.of(rotary)
        self.exponential = exponential
        if self.rotary:
            self.rotary.features(d)
        self.q_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(dim, self.kv_heads * d, bias=bias) for _ in range(2))
        self.delta_proj = nn.Linear(self.kv_heads * d, self.kv_heads, bias=bias)
        self.amount = nn.Parameter(torch.zeros(self.kv_heads))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        b, n, _ = x.shape
        q, k = (self._split(projection(x)) for projection in (self.q_proj, self.k_proj))
        flat = self.v_proj(x)
        v, delta = self._split(flat), (self.amount * F.softplus(self.delta_proj(flat))).mT
        if call.padding is not None:
            delta = delta.masked_fill(~call.padding[:, None], -torch.inf)
        if self.rotary is not None:
            positions = call.query_positions(x)
            q, k = rotate(q, positions, self.rotary), rotate(k, positions, self.rotary)
        places = torch.arange(call.seen, call.seen + n, device=x.device).expand(b, self.kv_heads, n)
        kept = None if call.state is None or not call.state.fixed else Held(**call.state.fixed)
        held = nothing_held(k, delta, self.window) if kept is None else kept
        mixed, weights = [], []
        # Split and not sliced: the backward pass of a slice is as long as the whole.
        chunks = zip(*(t.split(CHUNK, 2) for t in (q, k, v, delta, places)), strict=True)
        dense = [None] * -(-n // CHUNK) if call.dense is None else call.dense.split(CHUNK, 2)
        for (query, *new), allowed in zip(chunks, dense, strict=True):
            both, inside = running_top(held, Held(*new), newest=True)
            weight = self._weights(query, both, inside, allowed)
            held = after_chunk(both, inside, self.window)
            mixed.append(grouped_mix(weight, both.values))
            if call.need_weights:
                wide = weight.new_zeros(*weight.shape[:3], call.seen + n)
                weights.append(wide.scatter_add(3, self._each(both.places)[:, :, None].expand_as(weight), weight))
        if call.state is not None:
            call.state.fixed.update(held._asdict())
            call.state.advance(n)
        output = self.o_proj(torch.cat(mixed, 2).transpose(1, 2).flatten(-2))
        return Result(output, torch.cat(weights, 2) if weights else None)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _each(self, tensor: Tensor) -> Tensor:
        """What each key/value head has, for each of its query heads."""
        return tensor.repeat_interleave(self.heads // self.kv_heads, 1)

    def _weights(self, q: Tensor, both: Held, inside: Tensor, dense: Tensor | None) -> Tensor:
        bias = both.scores.masked_fill(both.scores == -torch.inf, 0.0)
        if self.exponential:
            bias = bias.clamp(max=30.0).exp()
        scores = grouped_scores(q * self.scale, both.keys) + self._each(bias)[:, :, None]
        allowed = self._each(inside)
        if dense is not None:
            index = self._each(both.places)[:, :, None].expand_as(allowed)
            allowed = allowed & dense.expand(-1, self.heads, -1, -1).gather(3, index)
        return masked_softmax(scores, allowed)
