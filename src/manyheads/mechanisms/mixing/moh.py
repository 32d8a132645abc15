"""Mixture-of-head attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary
from manyheads.functional.routing import balance_loss, top_k_mask
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention

ROUTINGS = ("learned", "query-norm")


@register
class MoH(SoftmaxAttention):
    """Each token weighs its heads by a router: the first few always, of the others only the best.

        out = W_o concat_h(gate_h o_h),  [a_s, a_r] = 2 softmax(W_0 x),  s shared, r routed heads, k of these active
        shared: gate = a_s s softmax(W_1 x);  routed: gate = a_r k p m / sum(p m),  p = softmax(W_g x), m = top k of p.

    The factors 2, s and k make the mean gate one; they and the division by sum(p m) are in the released code of the ViT
    and DiT models, which this follows, and not in the paper. One shared head: its softmax is the constant 1, as in the
    ViT code (the DiT code fails). No shared heads: there is no a. active_heads=0: all heads must be shared.
    routing="query-norm", the LLaMA form: no router, p = softmax(u / std(u)) over routed heads with u the norm of a
    head's query and std unbiased, and a gate is 1 for a head that is on and 0 for one that is off. In training a gate
    passes its gradient straight to p, as the paper says; its training code is not released.
    Losses: `balance` = r^2 mean_i(P_i F_i), P the mean of p and F of m over real tokens (the paper's weight is 0.01).
    All heads are computed, as in the released code. By default heads // 4 (LLaMA: heads // 2) are shared and 3/4 of all
    heads are on. Weights returned are those of the heads, without gates. Source: arXiv:2410.11842.
    Weights: the code's qkv is q, k, v in this order; wg, wg_1, wg_0 are router, shared_router, balance. Of the LLaMA
    form those of a LLaMA, as they are; its code works with as many shared as routed heads only.
    """

    card = Card(
        name="moh",
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        reference="arXiv:2410.11842",
        family=Family.MIXING,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        example={"shared_heads": 2, "active_heads": 1},
        notes="Heads that are off are computed and then multiplied by zero, as in the released code.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        routing: str = "learned",
        kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)
        if routing not in ROUTINGS:
            raise ValueError(f"moh: routing={routing!r}; want one of {list(ROUTINGS)}")
        self.routing, learned = routing, routing == "learned"
        shared = heads // (4 if learned else 2) if shared_heads is None else shared_heads
        routed = heads - shared
        active = max(routed - max(heads // 4, 1), min(routed, 1)) if active_heads is None else active_heads
        if not 0 <= shared <= heads or not min(routed, 1) <= active <= routed:
            raise ValueError(
                f"moh: shared_heads={shared} and active_heads={active} of heads={heads}; want 0 <= shared_heads <= "
                f"{heads} and {min(max(routed, 0), 1)} <= active_heads <= heads - shared_heads"
            )
        self.shared_heads, self.active_heads = shared, active
        self.router = nn.Linear(dim, routed, bias=False) if routed and learned else None
        self.shared_router = nn.Linear(dim, shared, bias=False) if shared > 1 and learned else None
        self.balance = nn.Linear(dim, 2, bias=False) if shared and routed and learned else None

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        gates, losses = (self._learned if self.routing == "learned" else self._by_query_norm)(x, call)
        gated = mixed.transpose(1, 2) * gates.to(mixed.dtype)[..., None]
        return self.o_proj(gated.flatten(-2)), losses

    def _learned(self, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Gates of all heads [b, n, h], and the losses."""
        parts, losses = [], {}
        if self.shared_heads:
            parts.append(self._shared_gates(x))
        if self.router is not None:
            gates, losses["balance"] = self._routed_gates(self.router(x), call.padding)
            parts.append(gates)
        if self.balance is not None:
            both = 2 * _softmax(self.balance(x))
            parts = [parts[0] * both[..., :1], parts[1] * both[..., 1:]]
        return torch.cat(parts, -1), losses

    def _by_query_norm(self, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The same in the LLaMA form."""
        # Once more, for `output` is not given the queries; turning them by position has not changed their norms.
        q, _, _ = self.project(x, x[:, :0])
        routed_q = q[:, self.shared_heads :]  # in float16 the gradient of their spread overflows
        norms = routed_q.to(torch.promote_types(q.dtype, torch.float32)).norm(dim=-1).mT
        shared = norms.new_ones(*norms.shape[:2], self.shared_heads)
        routed = norms.shape[-1]
        if not routed:
            return shared, {}
        spread = norms.std(-1, keepdim=True, correction=min(1, routed - 1))
        probs = _softmax(norms / spread.clamp(min=torch.finfo(norms.dtype).tiny))
        mask = top_k_mask(probs, self.active_heads)
        gates = mask + (probs - probs.detach()) if self.training else mask
        return torch.cat([shared.to(gates.dtype), gates], -1), {"balance": balance_loss(probs, mask, call.padding)}

    def _shared_gates(self, x: Tensor) -> Tensor:
        """[b, n, s]."""
        if self.shared_router is None:
            return torch.ones_like(x[..., :1])
        return self.shared_heads * _softmax(self.shared_router(x))

    def _routed_gates(self, logits: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """[b, n, r], zero where a head is off, and the balance loss."""
        probs = _softmax(logits)
        mask = top_k_mask(probs, self.active_heads)
        kept = probs * mask
        total = kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).eps)
        return self.active_heads * kept / total, balance_loss(probs, mask, padding)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
