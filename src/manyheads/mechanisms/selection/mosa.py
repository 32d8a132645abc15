"""Mixture of sparse attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.rotary import Rotary, rotate
from manyheads.functional.running import CHUNK, Held, after_chunk, nothing_held, running_top
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class MoSA(Mechanism):
    """Every head chooses its own few tokens (expert choice) and attends among them alone.

        r = x w_h;  I_h = the top_k tokens of largest r;  for i in I_h: sigmoid(r_i) softmax over j in I_h of
        (q_i . k_j / sqrt(d)), times v_j;  zero for every other i;  the heads are summed through W_o

    Noncausal: I_h is taken over the whole sequence. Causal: I_h(i) are the best top_k tokens of 0 .. i; i has an output
    if it is among them, a token once pushed out never comes back, and the state holds top_k tokens. The published
    causal model takes I_h over the whole sequence and masks j > i: there later tokens decide who is chosen.

    Source: arXiv:2505.00315 and its released code. There top_k is the length over a sparsity; here it is given, so that
    padding and decoding change nothing. The paper adds dense heads: sum this module with another. Equal r: the earlier
    token wins.
    Weights: rows of q_proj, k_proj, v_proj for head h are the thirds of QKV.W[h], [dim, 3 d], transposed; columns of
    o_proj for head h are O.W[h], [d, dim], transposed. The code turns the first half of a head's features.
    """

    card = Card(
        name="mosa",
        title="Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing",
        reference="arXiv:2505.00315",
        family=Family.SELECTION,
        patterns={"noncausal-self", "causal-self"},
        time="n + k^2",
        state="k",
        example={"top_k": 3},
        notes="Most tokens get zero from most heads: use it beside dense heads. The causal form keeps a running top-k.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        top_k: int = 64,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if top_k < 1:
            raise ValueError(f"{self.card.name}: top_k={top_k} must be positive")
        self.top_k, self.scale, self.rotary = top_k, self.head_dim**-0.5, Rotary.of(rotary)
        if self.rotary:
            self.rotary.features(self.head_dim)
        self.router = nn.Linear(dim, heads, bias=False)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        scores = self.router(x).mT
        if call.padding is not None:
            scores = scores.masked_fill(~call.padding[:, None], -torch.inf)
        mixed, weights = self._running(x, scores, call) if self.causal else self._chosen(x, scores, call)
        return Result(self.o_proj(mixed.transpose(1, 2).flatten(-2)), weights)

    # -- noncausal -------------------------------------------------------------------------------------------------

    def _chosen(self, x: Tensor, scores: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        b, n, _ = x.shape
        best, index = scores.topk(min(self.top_k, n), -1)
        rows = x[torch.arange(b, device=x.device)[:, None, None], index]
        positions = call.query_positions(x).expand(b, n)[:, None].expand(-1, self.heads, -1).gather(2, index)
        q, k, v = (self._project(rows, each) for each in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._turn(q, positions), self._turn(k, positions)
        chosen = best != -torch.inf
        allowed = chosen[..., None, :] & chosen[..., None]
        place = index[..., None] * n + index[..., None, :]
        if call.dense is not None:
            dense = call.dense.expand(-1, self.heads, -1, -1).flatten(2)
            allowed = allowed & dense.gather(2, place.flatten(2)).view_as(place)
        gate = best.masked_fill(~chosen, 0.0).sigmoid()[..., None]
        weights = gate * masked_softmax(q * self.scale @ k.mT, allowed)
        spread = index[..., None].expand_as(q)
        mixed = q.new_zeros(b, self.heads, n, self.head_dim).scatter(2, spread, weights @ v)
        if not call.need_weights:
            return mixed, None
        full = weights.new_zeros(b, self.heads, n * n).scatter(2, place.flatten(2), weights.flatten(2))
        return mixed, full.view(b, self.heads, n, n)

    def _project(self, rows: Tensor, projection: nn.Linear) -> Tensor:
        """rows [b, h, k, e], each head's own through that head's part of the projection -> [b, h, k, d]."""
        out = rows @ projection.weight.unflatten(0, (self.heads, -1)).mT
        return out if projection.bias is None else out + projection.bias.view(self.heads, 1, -1)

    def _turn(self, rows: Tensor, positions: Tensor) -> Tensor:
        """rows [b, h, k, d], positions [b, h, k]."""
        if self.rotary is None:
            return rows
        turned = rotate(rows.flatten(0, 1)[:, None], positions.flatten(0, 1), self.rotary)
        return turned.squeeze(1).unflatten(0, rows.shape[:2])

    # -- causal ----------------------------------------------------------------------------------------------------

    def _running(self, x: Tensor, scores: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        b, n, _ = x.shape
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotary is not None:
            positions = call.query_positions(x)
            q, k = rotate(q, positions, self.rotary), rotate(k, positions, self.rotary)
        places = torch.arange(call.seen, call.seen + n, device=x.device).expand(b, self.heads, n)
        kept = None if call.state is None or not call.state.fixed else Held(**call.state.fixed)
        held = nothing_held(k, scores, self.top_k) if kept is None else kept
        mixed, weights = [], []
        for start in range(0, n, CHUNK):
            part = slice(start, start + CHUNK)
            both, inside = running_top(held, Held(k[:, :, part], v[:, :, part], scores[:, :, part], places[:, :, part]))
            weight = self._among(q[:, :, part], scores[:, :, part], both, inside, call.dense, part)
            held = after_chunk(both, inside, self.top_k)
            mixed.append(weight @ both.values)
            if call.need_weights:
                wide = weight.new_zeros(*weight.shape[:3], call.seen + n)
                weights.append(wide.scatter_add(3, both.places[:, :, None].expand_as(weight), weight))
        if call.state is not None:
            call.state.fixed.update(held._asdict())
            call.state.advance(n)
        return torch.cat(mixed, 2), torch.cat(weights, 2) if weights else None

    def _among(
        self, q: Tensor, scores: Tensor, both: Held, inside: Tensor, dense: Tensor | None, rows: slice
    ) -> Tensor:
        """Weights [b, h, c, k + c] of a chunk of queries: those that are among the tokens held have any."""
        active = inside[..., -q.shape[2] :].diagonal(dim1=-2, dim2=-1)
        allowed = inside & active[..., None]
        if dense is not None:
            index = both.places[:, :, None].expand_as(allowed)
            allowed = allowed & dense[:, :, rows].expand(-1, self.heads, -1, -1).gather(3, index)
        gate = scores.masked_fill(~active, 0.0).sigmoid()[..., None]
        return gate * masked_softmax(q * self.scale @ both.keys.mT, allowed)
