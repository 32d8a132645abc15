"""Mixture of attention heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import (
    attend_grouped,
    attend_rows,
    grouped_mix,
    grouped_scores,
    masked_softmax,
)
from manyheads.functional.rotary import Rotary, rotate
from manyheads.functional.routing import expert_losses, grouped_linear
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.softmax import Where
from manyheads.state import State


@register
class MixtureOfAttentionHeads(Mechanism):
    """Each token chooses a few of many attention heads; only these are computed, over keys and values shared by all.

        p = softmax(W_g x),  y = sum_{e in top k of p} p_e W_o^e attend(W_q^e x / sqrt(d), W_k x', W_v x')

    heads: experts. active: k. head_dim: d of every expert and of the one key and value head; by default dim / active,
    so that the active heads together are as wide as the model.
    Gates are plain probabilities, as in the released code; the paper divides by their detached sum (in the code, a
    comment). The code starts W_g at zero, where the order of the experts settles all ties; here it starts normal with
    deviation 0.02, so that tokens differ from the first step. Padded tokens get gate zero. Neither noisy gates nor
    sampled choices, both off in the code by default.
    Losses, unweighted, over real tokens: cv, switch, z. Weights returned are gated: a head's row is its gate times its
    attention, zero where it was not chosen. Source: arXiv:2210.05144.
    Weights: router.weight is q_proj.w_gate transposed; q_experts, o_experts are q_proj.experts.w and
    q_proj.output_experts.w.
    """

    card = Card(
        name="moa",
        title="Mixture of Attention Heads: Selecting Attention Heads Per Token",
        reference="arXiv:2210.05144",
        family=Family.MIXING,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2 active / heads",
        state="n / active",
        example={"active": 2},
        notes="Its three losses, computed in every pass, cost up to a seventh more time than transformers' JetMoe "
        "takes.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        active: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.active = max(1, heads // 2) if active is None else active
        if not 1 <= self.active <= heads:
            raise ValueError(f"moa: active={active} of heads={heads} experts; want 1 <= active <= {heads}")
        if head_dim is None and dim % self.active:
            raise ValueError(f"moa: dim={dim} is not divisible by active={self.active}; give head_dim")
        self.head_dim = dim // self.active if head_dim is None else head_dim
        if self.head_dim < 1:
            raise ValueError(f"moa: head_dim={head_dim} must be positive")
        self.rotary = Rotary.of(rotary)
        if self.rotary:
            self.rotary.features(self.head_dim)
        self.scale = self.head_dim**-0.5
        self.router = nn.Linear(dim, heads, bias=False)
        self.q_experts = nn.Parameter(torch.empty(heads, dim, self.head_dim))
        self.o_experts = nn.Parameter(torch.empty(heads, self.head_dim, dim))
        self.k_proj = nn.Linear(dim, self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.head_dim, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.router.weight, std=0.02)
        bound = math.sqrt(6 / (self.dim + self.head_dim))
        for experts in (self.q_experts, self.o_experts):
            nn.init.uniform_(experts, -bound, bound)
        for projection in (self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        """k slots stand in as heads over the one key head: slot s of a token is its s-th choice."""
        b, n, _ = x.shape
        own_padding = call.padding if context is None else None
        index, gates, losses = self._route(x, own_padding)
        rows = x[:, :, None].expand(-1, -1, self.active, -1).flatten(0, 2)
        q = grouped_linear(rows, index.flatten(), self.q_experts).view(b, n, self.active, -1).transpose(1, 2)
        positions = call.query_positions(x)
        q = q if self.rotary is None else rotate(q, positions, self.rotary)
        k, v, where = self._read(x, context, call, positions)

        slots = index.transpose(1, 2)
        if call.need_weights:
            weights = masked_softmax(grouped_scores(q * self.scale, k), _per_slot(where, slots))
            mixed = grouped_mix(weights, v)
        else:
            weights, mixed = None, self._fused(q, k, v, where, slots)
        gated = mixed.transpose(1, 2) * gates[..., None].to(mixed.dtype)
        output = grouped_linear(gated.flatten(0, 2), index.flatten(), self.o_experts).view(b, n, self.active, -1).sum(2)
        if weights is None:
            return Result(output, None, losses)
        every = weights.new_zeros(b, self.heads, n, weights.shape[-1])
        weights = weights * gates.transpose(1, 2)[..., None].to(weights.dtype)
        return Result(output, every.scatter(1, slots[..., None].expand_as(weights), weights), losses)

    def _route(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Experts chosen [b, n, k], their gates [b, n, k] and the losses."""
        logits = self.router(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        gates, index = logits.softmax(-1).topk(self.active, -1)
        losses = expert_losses(logits, torch.zeros_like(logits).scatter(-1, index, gates), padding)
        if padding is not None:
            gates = gates.masked_fill(~padding[..., None], 0.0)
        return index, gates, losses

    def _read(self, x: Tensor, context: Any, call: Call, positions: Tensor) -> tuple[Tensor, Tensor, Where]:
        """Keys and values [b, 1, m, d] with those that the state holds, and who may attend to whom."""
        i = torch.arange(call.seen, call.seen + x.shape[1], device=x.device)
        state = call.state
        if context is not None:
            j = torch.arange(context.shape[1], device=x.device)
            k, v = self._context_keys(context, j[None], state)
            if state is not None:
                state.advance(x.shape[1])
            return k, v, Where(i, j, positions, j[None], call.padding, call.dense)
        k, v = self._keys(x, positions)
        padding = call.padding
        j = torch.arange(call.seen + x.shape[1], device=x.device)
        if state is not None:
            padding = state.append_optional("padding", padding, torch.ones_like(j, dtype=torch.bool)[None])
            k, v = state.append("keys", k), state.append("values", v)
            state.advance(x.shape[1])
        return k, v, Where(i, j, positions, j[None], padding, call.dense, self.causal)

    def _keys(self, source: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.k_proj(source)[:, None], self.v_proj(source)[:, None]
        return k if self.rotary is None else rotate(k, positions, self.rotary), v

    def _context_keys(self, context: Tensor, positions: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
        if state is None:
            return self._keys(context, positions)
        if "keys" not in state.context:
            state.context["keys"], state.context["values"] = self._keys(context, positions)
        k, v = state.context["keys"], state.context["values"]
        if k.shape[2] != context.shape[1]:
            raise ValueError(
                f"moa: the state was made for a context of {k.shape[2]} tokens, this one has {context.shape[1]}; "
                "start a new state for a new context"
            )
        return k, v

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where, slots: Tensor) -> Tensor:
        n = q.shape[2]
        alone = where.padding is None and where.dense is None
        if alone and (where.square or not where.causal or n == 1):
            return attend_grouped(q, k, v, scale=self.scale, causal=where.square and n > 1)

        def allowed(rows: slice) -> Tensor | None:
            return _per_slot(where.rows(rows), slots[:, :, rows])

        return attend_rows(q, k, v, allowed, scale=self.scale, causal=where.causal)


def _per_slot(where: Where, slots: Tensor) -> Tensor | None:
    """What is allowed, [b or 1, k or 1, n, m]: a mask per expert becomes that of the expert in each slot."""
    allowed = where.allowed()
    if allowed is None or allowed.shape[1] == 1:
        return allowed
    return allowed.gather(1, slots[..., None].expand(-1, -1, -1, allowed.shape[-1]))
