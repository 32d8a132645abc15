"""Adaptively sparse attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.entmax import entmax
from manyheads.functional.rotary import Rotary
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class Entmax(SoftmaxAttention):
    """Each head learns how sparse it is: weights are exactly zero outside a support that the scores choose.

        alpha-entmax(s_i)_j = [(alpha - 1) s_ij - tau_i]_+^(1 / (alpha - 1)),  s_ij = q_i . k_j / sqrt(d),

    with tau_i such that the weights sum to one, and alpha_h = 1 + sigmoid(a_h) for a learned a_h [h]: between softmax
    (alpha = 1) and sparsemax (2).

    Source: Correia et al., arXiv:1909.00015; alpha-entmax and its gradient: Peters et al., arXiv:1905.05702. a_h starts
    from N(0, 1) as in the released code, which also clamps alpha to at least 1.01; the form used here is stable down
    to softmax, so that there is no clamp.
    """

    card = Card(
        name="entmax",
        title="Adaptively Sparse Transformers",
        reference="arXiv:1909.00015",
        family=Family.SCORING,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2",
        state="n",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        self.alpha_logit = nn.Parameter(torch.randn(heads))

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        logit = self.alpha_logit.to(torch.promote_types(scores.dtype, torch.float32))
        return entmax(scores, logit.sigmoid()[:, None, None], allowed)
