"""Multi-head latent attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import (
    attend_grouped,
    attend_rows,
    grouped_mix,
    grouped_scores,
    masked_softmax,
)
from manyheads.functional.layers import RMSNorm, plain_weight
from manyheads.functional.rotary import Rotary, rotate
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.softmax import Where


@register
class MLA(Mechanism):
    """Keys and values of all heads are read from one small latent per token, which is all that is cached.

        [c_j; r_j] = W_kva x_j, c_j = RMSNorm(c_j);  [k_j^h; v_j^h] = W_kvb^h c_j;  [q_i^h; p_i^h] = W_q^h x_i,
        softmax_j((q_i^h . k_j^h + R(p_i^h) . R(r_j)) / sqrt(d_nope + d_rope)) v_j^h.

    R is rotary embedding on pairs (2i, 2i + 1); r_j is shared by the heads. With q_lora_rank, W_q x is
    W_qb RMSNorm(W_qa x). Defaults have DeepSeek-V2's proportions: with d = dim / heads, kv_lora_rank is 4 d,
    d_rope d / 2, d_nope and d_v d.

    Decoding absorbs W_kvb into queries and outputs: q_i^T W_k^h meets c_j itself, and W_v^h the mixed latents. For a
    chunk of many queries expanding the keys costs less, and is what happens; so it does, at a cost per step, while an
    adapter, quantised weights or a hook are around W_kvb (merge an adapter before decoding at length).
    Source: DeepSeek-V2, arXiv:2405.04434; names and norms as in its code, without its context extension (YaRN).
    """

    card = Card(
        name="mla",
        title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        reference="arXiv:2405.04434",
        family=Family.PROJECTION,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n (kv_lora_rank + qk_rope_head_dim)",
        example={"q_lora_rank": 6, "kv_lora_rank": 10, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5},
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        q_lora_rank: int | None = None,
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if None in (kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim):
            usual = self._split_heads()
            kv_lora_rank = 4 * usual if kv_lora_rank is None else kv_lora_rank
            qk_nope_head_dim = usual if qk_nope_head_dim is None else qk_nope_head_dim
            qk_rope_head_dim = max(2, usual // 4 * 2) if qk_rope_head_dim is None else qk_rope_head_dim
            v_head_dim = usual if v_head_dim is None else v_head_dim
        assert kv_lora_rank is not None
        assert qk_nope_head_dim is not None
        assert qk_rope_head_dim is not None
        assert v_head_dim is not None
        self._check_sizes(q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        self.rank, self.nope, self.rope, self.value = kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.rotary = Rotary(base=base, interleaved=True)
        self.scale = (self.nope + self.rope) ** -0.5
        queries = heads * (self.nope + self.rope)
        if q_lora_rank is None:
            self.q_proj: nn.Module = nn.Linear(dim, queries, bias=False)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(dim, q_lora_rank, bias=bias),
                RMSNorm(q_lora_rank, eps=1e-6),
                nn.Linear(q_lora_rank, queries, bias=False),
            )
        self.kv_a_proj = nn.Linear(dim, self.rank + self.rope, bias=bias)
        self.kv_a_norm = RMSNorm(self.rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(self.rank, heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(heads * self.value, dim, bias=bias)

    def _check_sizes(self, q_rank: int | None, rank: int, nope: int, rope: int, value: int) -> None:
        if rope < 2 or rope % 2:
            raise ValueError(f"mla: qk_rope_head_dim={rope} must be even and at least 2, as features turn in pairs")
        if min(rank, nope, value, 1 if q_rank is None else q_rank) < 1:
            raise ValueError(
                f"mla: q_lora_rank={q_rank}, kv_lora_rank={rank}, qk_nope_head_dim={nope} and v_head_dim={value} must "
                "be positive"
            )

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q_nope, q_rope = (
            self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).split([self.nope, self.rope], -1)
        )
        c, r = self.kv_a_proj(x)[:, None].split([self.rank, self.rope], -1)
        # Queries and their own keys stand at the same places: turned together, in half the calls of a step.
        turned = rotate(torch.cat([q_rope, r], 1), call.query_positions(x), self.rotary)
        q_rope, r = turned.split([self.heads, 1], 1)
        latent, where = self._read(x, torch.cat([self.kv_a_norm(c), r], -1), call)
        # Whoever listens is told of keys and values, which the absorbed pass never makes.
        absorb = call.state is not None and self._absorbing_pays(x.shape[1]) and self.listener is None
        # Without its weight alone W_kvb cannot be absorbed: an adapter or a hook around it acts on calls.
        weight = plain_weight(self.kv_b_proj) if absorb else None
        if weight is None:
            mixed, weights = self._expanded(q_nope, q_rope, latent, where, call.need_weights)
        else:
            mixed, weights = self._absorbed(weight, q_nope, q_rope, latent, where, call.need_weights)
        return Result(self.o_proj(mixed.transpose(1, 2).flatten(-2)), weights)

    def _read(self, x: Tensor, latent: Tensor, call: Call) -> tuple[Tensor, Where]:
        """What is cached of all tokens, [b, 1, m, rank + rope]: the normed latent, and the turned key part. latent:
        that of the tokens x."""
        positions, state, n = call.query_positions(x), call.state, x.shape[1]
        j = torch.arange(call.seen + n, device=x.device)
        i, padding = j[call.seen :], call.padding
        if state is not None:
            padding = state.append_optional("padding", padding, torch.ones_like(j, dtype=torch.bool)[None])
            latent = state.append("latent", latent)
            state.advance(n)
        return latent, Where(i, j, positions, j[None], padding, call.dense, self.causal)

    def _absorbing_pays(self, n: int) -> bool:
        """Multiplications per key and head: n (2 rank + rope), or the expansion and n (nope + rope + value)."""
        return n * (2 * self.rank - self.nope - self.value) <= self.rank * (self.nope + self.value)

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, where: Where, need: bool
    ) -> tuple[Tensor, Tensor | None]:
        c, r = latent.split([self.rank, self.rope], -1)
        kv = self.kv_b_proj(c[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv.split([self.nope, self.value], -1)
        k = torch.cat([k, r.expand(-1, self.heads, -1, -1)], -1)
        q = torch.cat([q_nope, q_rope], -1)
        if need:
            mixed, weights = self._weigh(q, k, v, where)
            return self.offered(q, k, v, mixed, weights, where), weights
        # PyTorch's kernel that holds no [n, m] matrix wants one size for keys and values: zeros change neither.
        size = max(self.nope + self.rope, self.value)
        q, k, v = (F.pad(t, (0, size - t.shape[-1])) for t in (q, k, v))
        return self._kernel(q, k, v, where)[..., : self.value], None

    def _absorbed(
        self, weight: Tensor, q_nope: Tensor, q_rope: Tensor, latent: Tensor, where: Where, need: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One key/value head for all: the latents as they lie in the state, without a copy."""
        to_key, to_value = weight.unflatten(0, (self.heads, -1)).split([self.nope, self.value], 1)
        q = torch.cat([q_nope @ to_key, q_rope], -1)
        mixed, weights = (
            self._weigh(q, latent, latent, where) if need else (self._kernel(q, latent, latent, where), None)
        )
        return mixed[..., : self.rank] @ to_value.transpose(1, 2), weights

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        weights = masked_softmax(grouped_scores(q * self.scale, k), where.allowed())
        return grouped_mix(weights, v), weights

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        free = where.padding is None and where.dense is None
        if free and (where.square or not where.causal or q.shape[2] == 1):
            return attend_grouped(q, k, v, scale=self.scale, causal=where.square and q.shape[2] > 1)
        return attend_rows(q, k, v, lambda rows: where.rows(rows).allowed(), scale=self.scale, causal=where.causal)
