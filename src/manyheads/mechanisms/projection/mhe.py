"""Multi-head embedding attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix
from manyheads.functional.passes import any_allowed, attend_where
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where

MODES = ("add", "mul")


@register
class MHE(SoftmaxAttention):
    """One projection for all heads, which differ by a learned vector each: 3 h d parameters beside a single head's.

        add: q_i = W_q x + e_i^Q,   mul: q_i = (W_q x) * (1 + e_i^Q),   k_i and v_i alike;   head i = softmax(..) v_i

    W_q, W_k, W_v [d, dim] with d = dim / heads; e [heads, d]; W_o [dim, dim].
    As a product with e_i^K can be taken to the query, and that with (or sum of) e_i^V to the mixed values, one key and
    value are held per token, as in multi-query attention. In mode "add" e_i^K moves all scores of a query alike, which
    softmax does not see: it is left out.
    Source: Xue and Aletras, Pit One Against Many, arXiv:2310.07911 (abstract and method; no code was released). How e
    starts is not said there: here at N(0, 0.02), so that heads differ from the first step on.
    """

    card = Card(
        name="mhe",
        title="Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention",
        reference="arXiv:2310.07911",
        family=Family.PROJECTION,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2",
        state="n / heads",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, mode: str = "mul", bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=1, bias=bias)
        if mode not in MODES:
            raise ValueError(f"mhe: mode={mode!r}; want one of {list(MODES)}")
        self.mode = mode
        self.q_proj = nn.Linear(dim, self.head_dim, bias=bias)
        self.query_embedding = nn.Parameter(0.02 * torch.randn(heads, self.head_dim))
        self.key_embedding = nn.Parameter(0.02 * torch.randn(heads, self.head_dim)) if mode == "mul" else None
        self.value_embedding = nn.Parameter(0.02 * torch.randn(heads, self.head_dim))

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x)[:, None], self.k_proj(source)[:, None], self.v_proj(source)[:, None]
        if self.key_embedding is None:
            return q + self.query_embedding[:, None], k, v
        return q * ((1 + self.query_embedding) * (1 + self.key_embedding))[:, None], k, v

    def mix(self, weights: Tensor, v: Tensor, where: Where) -> Tensor:
        return self._with_embedding(grouped_mix(weights, v), any_allowed(where))

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        return self._with_embedding(attend_where(q, k, v, where, scale=self.scale)[0], any_allowed(where))

    def _with_embedding(self, mixed: Tensor, seen: Tensor | None) -> Tensor:
        """Weights sum to one, or to zero where a query has nothing to attend to: there nothing is added."""
        embedding = self.value_embedding[:, None]
        if self.mode == "mul":
            return mixed * (1 + embedding)
        return mixed + (embedding if seen is None else embedding * seen)
