"""TransICD's code-wise attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class CodeWise(Mechanism):
    """Every label reads a document with weights of its own, and gets the mean of its tokens under them.

        a_l = softmax over t of u_l . tanh(W h_t + b);   y_l = sum_t a_lt h_t

    x: labels u [b, n, dim], a learned embedding given to every document, or the embedded descriptions of the labels.
    context: document tokens h [b, m, dim]. Labels do not see each other. A classifier per label reads y_l.

    Source: Biswas et al., TransICD: Transformer Based Code-wise Attention Model for Explainable ICD Coding,
    arXiv:2104.10652, and its released models.py, where W can be wider than dim and u_l has a bias, which softmax
    cancels. The paper has one distribution per label: heads is 1. The pattern `pool` has one vector for all labels and
    is not declared.
    """

    card = Card(
        name="code-wise",
        title="TransICD: Transformer Based Code-wise Attention Model for Explainable ICD Coding",
        reference="arXiv:2104.10652",
        family=Family.POOLING,
        patterns={"noncausal-cross"},
        time="n m",
        state="",
        decodes=False,
        example={"heads": 1},
        notes="a pool per label: x are the labels, the context is the document",
    )

    def __init__(self, dim: int, heads: int = 1, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        if heads != 1:
            raise ValueError(f"code-wise: heads={heads}; each label has one distribution, want heads=1")
        self.w_proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        allowed = call.dense
        if call.padding is not None:
            context = context.masked_fill(~call.padding[..., None], 0.0)
            allowed = call.padding[:, None, None]
        keys = torch.tanh(self.w_proj(context))[:, None]
        pooled, weights = attend_weighted(
            x[:, None], keys, context[:, None], allowed, scale=1.0, need_weights=call.need_weights
        )
        return Result(pooled[:, 0], weights)
