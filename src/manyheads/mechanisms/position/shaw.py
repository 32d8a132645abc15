"""Relative position representations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, grouped_scores
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where


@register
class Shaw(SoftmaxAttention):
    """Keys and values carry a learned vector for their distance from the query, clipped at k = max_distance.

        softmax_j(q_i . (k_j + A^K[c_ij]) / sqrt(d)) (v_j + A^V[c_ij]),  c_ij = clip(p_j - p_i, -k, k) + k,

    with p the positions, and tables A^K, A^V [2k + 1, d] shared by the heads. The vectors per pair [n, m, d] are never
    held: scores gather from q A^K^T [n, 2k + 1], and weights are summed into 2k + 1 buckets before they meet A^V.

    Source: Shaw et al., arXiv:1803.02155, and its code in tensor2tensor. Both terms of the score are scaled, as in
    the code. Of a causal instance the rows for later keys are never read.
    """

    card = Card(
        name="shaw",
        title="Self-Attention with Relative Position Representations",
        reference="arXiv:1803.02155",
        family=Family.POSITION,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        example={"max_distance": 3},
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, max_distance: int = 16, bias: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        if max_distance < 0:
            raise ValueError(f"shaw: max_distance={max_distance} must not be negative")
        self.max_distance = max_distance
        self.key_table = nn.Parameter(torch.empty(2 * max_distance + 1, self.head_dim))
        self.value_table = nn.Parameter(torch.empty(2 * max_distance + 1, self.head_dim))
        nn.init.xavier_uniform_(self.key_table)
        nn.init.xavier_uniform_(self.value_table)

    def _buckets(self, where: Where) -> Tensor:
        """c_ij as an index [b or 1, 1, n, m]."""
        distance = where.key_positions[:, None, None, :] - where.query_positions[:, None, :, None]
        return distance.clamp(-self.max_distance, self.max_distance) + self.max_distance

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        q = q * self.scale
        scores = grouped_scores(q, k)
        return scores + (q @ self.key_table.T).gather(-1, self._buckets(where).expand_as(scores))

    def mix(self, weights: Tensor, v: Tensor, where: Where) -> Tensor:
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        buckets = wide.new_zeros(*weights.shape[:-1], len(self.value_table))
        buckets = buckets.scatter_add(-1, self._buckets(where).expand_as(weights), wide).to(weights.dtype)
        return grouped_mix(weights, v) + buckets @ self.value_table
