"""Neural Attention: a small network scores each pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyheads.card import Card, Family
from manyheads.functional.layers import plain_weight
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where

# Hidden values held at once, over batch, heads, rows, keys and features: bounds the memory beside the scores.
HIDDEN = 1 << 22


@register
class NeuralAttention(SoftmaxAttention):
    """A feed-forward network in place of the dot product scores each query with each key.

        s_ij = w3 . relu(W2 relu(W1 [q'_i; k'_j] + b1) + b2),  q' = Wq q + bq,  k' = Wk k + bk,

    with p = score_dim features in q' and k', W1 [p, 2p], W2 [p // 2, p], w3 [p // 2], the same for all heads; then
    softmax over j. W1 is split, so that the pairs [n, m, 2p] are never held, and rows are scored in slices.

    Source: DiGiugno and Mahmood, arXiv:2502.17206, and its code, whence: no 1 / sqrt(d), and p = d // 32 (here at least
    2). Unlike the code, features of a head lie together in the projections, and w3 has no bias (softmax ignores it).
    The paper has self attention only; nothing in the score asks for that.
    Weights: feature i of head h is row (3 i + s) heads + h of the code's to_qkv, s = 0, 1, 2 for q, k, v, and row h d +
    i here; linear1 to linear3 are first to third.
    """

    shares_kv = False
    card = Card(
        name="neural-attention",
        title="Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
        reference="arXiv:2502.17206",
        family=Family.SCORING,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2 score_dim^2",
        state="n",
        example={"score_dim": 6},
        notes="Costs score_dim^2 / 2 multiplications per pair and head instead of head_dim. Slower to learn lookup "
        "than softmax: 87% on quick recall, 95% in five times the steps.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, score_dim: int | None = None) -> None:
        super().__init__(dim, heads, causal=causal)
        p = max(2, self.head_dim // 32) if score_dim is None else score_dim
        if p < 2:
            raise ValueError(f"neural-attention: score_dim={score_dim} must be at least 2")
        self.score_dim = p
        self.query_in = nn.Linear(self.head_dim, p)
        self.key_in = nn.Linear(self.head_dim, p)
        self.first = nn.Linear(2 * p, p)
        self.second = nn.Linear(p, p // 2)
        self.third = nn.Linear(p // 2, 1, bias=False)

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        q, k, weight, first = self.query_in(q), self.key_in(k), plain_weight(self.first), self._of_pairs
        if weight is not None:
            of_query, of_key = weight.split(self.score_dim, 1)
            q, k, first = q @ of_query.T + self.first.bias, k @ of_key.T, _sums
        b, h, m, p = k.shape
        rows = max(1, HIDDEN // (b * h * m * p))
        if rows >= q.shape[2]:
            return self._score_rows(q, k, first)
        # Under autograd each slice is computed again in the backward pass: its hidden values are not kept.
        parts = [checkpoint(self._score_rows, part, k, first, use_reentrant=False) for part in q.split(rows, 2)]
        return torch.cat(parts, 2)

    def _score_rows(self, q: Tensor, k: Tensor, first: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        hidden = first(q[:, :, :, None], k[:, :, None]).relu()
        return self.third(self.second(hidden).relu()).squeeze(-1)

    def _of_pairs(self, q: Tensor, k: Tensor) -> Tensor:
        """W1 on pairs, for a W1 that cannot be split."""
        return self.first(torch.cat(torch.broadcast_tensors(q, k), -1))


def _sums(q: Tensor, k: Tensor) -> Tensor:
    return q + k
