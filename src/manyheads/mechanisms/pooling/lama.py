"""LAMA: low-rank factorised multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.precision import unit
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class Lama(Mechanism):
    """Every head scores a word against the mean of all words, by an affinity of rank one: two vectors per head.

        c = mean over t of x_t;   s_t = tanh(P^T c * Q^T x_t) / |tanh(P^T c * Q^T x_t)|_2, the norm taken over heads
        a_h = softmax over t of s_th;   y = W_o concat over h of sum_t a_ht x_t

    P, Q: [dim, heads], column h is head h. x: [b, n, dim] -> [b, dim]; weights: [b, heads, 1, n]. Scores lie in
    [-1, 1] and no word compares itself with another, so that the cost is n heads dim.

    Source: Mehta et al., Low Rank Factorization for Compact Multi-Head Self-Attention, arXiv:1912.00835; no code by the
    authors is known; the norm over heads and the mean as context follow the public reimplementation (JohnGiorgi).
    The paper's classifier reads the matrix of head vectors; W_o, without bias, brings it to dim.
    """

    card = Card(
        name="lama",
        title="Low Rank Factorization for Compact Multi-Head Self-Attention",
        reference="arXiv:1912.00835",
        family=Family.POOLING,
        patterns={"pool"},
        time="n",
        state="",
        decodes=False,
        notes="a pool over hidden states that know their place (the paper's are a GRU's)",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        if heads < 2:
            raise ValueError(
                f"lama: heads={heads}; scores are normalised over heads, which leaves one head nothing but a sign: "
                "want at least 2"
            )
        self.p_proj = nn.Linear(dim, heads, bias=False)
        self.q_proj = nn.Linear(dim, heads, bias=False)
        self.o_proj = nn.Linear(heads * dim, dim, bias=False)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "lama pools x into one vector: a dense mask was not expected; give key padding [batch, n] as the mask"
            )
        allowed = None
        if call.padding is None:
            mean = x.mean(1, keepdim=True)
        else:
            x = x.masked_fill(~call.padding[..., None], 0.0)
            mean = x.sum(1, keepdim=True) / call.padding.sum(1).clamp_min(1)[:, None, None]
            allowed = call.padding[:, None]
        scores = unit(torch.tanh(self.p_proj(mean) * self.q_proj(x)))
        weights = masked_softmax(scores.transpose(1, 2), allowed)
        output = self.o_proj((weights @ x).flatten(1))
        return Result(output, weights[:, :, None] if call.need_weights else None)
