"""LDAM: label-dependent attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class LabelDependent(Mechanism):
    """A word weighs as much as the label that it and its neighbours fit best, words and labels embedded jointly.

        g_tl = (F x_t) . (F c_l) / sqrt(dim);   u_tl = relu(filter over t of g)_tl;   a = softmax over t of max_l u_tl
        y = F sum_t a_t x_t

    c: `labels` learned vectors, [labels, dim]; set them to the embedded names of the labels. filter: one, of `ngram`
    words (odd), with a bias, shared by the labels; F: linear, shared by words, labels and result. x: [b, n, dim] ->
    [b, dim]; weights: [b, 1, 1, n].

    Source: Niu et al., Label Dependent Attention Model for Disease Risk Prediction Using Multimodal Electronic Health
    Records, arXiv:2201.06779, text branch as in its released text_bert.py: scaled products, where Wang et al.
    (arXiv:1805.04174), whose frame it takes, have cosines. Its dropouts are left out; padded words are zero to the
    filter and take no weight, in the code they do.
    """

    card = Card(
        name="label-dependent",
        title="Label Dependent Attention Model for Disease Risk Prediction Using Multimodal Electronic Health Records",
        reference="arXiv:2201.06779",
        family=Family.POOLING,
        patterns={"pool"},
        time="n",
        state="",
        decodes=False,
        example={"heads": 1, "labels": 5, "ngram": 3},
        notes="one distribution over the words for all labels together",
    )

    def __init__(self, dim: int, heads: int = 1, *, causal: bool = False, labels: int = 25, ngram: int = 3) -> None:
        super().__init__(dim, heads, causal=causal)
        if heads != 1:
            raise ValueError(f"label-dependent: heads={heads}; all labels share one distribution, want heads=1")
        if labels < 1 or ngram < 1 or ngram % 2 == 0:
            raise ValueError(f"label-dependent: labels={labels}, ngram={ngram}; want labels >= 1 and ngram odd")
        self.labels = nn.Parameter(torch.randn(labels, dim))
        self.joint = nn.Linear(dim, dim)
        self.filter = nn.Parameter(torch.full((ngram,), 1 / ngram))
        self.filter_bias = nn.Parameter(torch.zeros(1))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "label-dependent pools x into one vector: a dense mask was not expected; give key padding [batch, n] "
                "as the mask"
            )
        if call.padding is not None:
            x = x.masked_fill(~call.padding[..., None], 0.0)
        fit = self.joint(x) * self.dim**-0.5 @ self.joint(self.labels).T
        if call.padding is not None:
            fit = fit.masked_fill(~call.padding[..., None], 0.0)
        ngram = len(self.filter)
        near = F.pad(fit, (0, 0, ngram // 2, ngram // 2)).unfold(1, ngram, 1) @ self.filter
        scores = torch.relu(near + self.filter_bias).amax(-1)
        weights = masked_softmax(scores, call.padding)[:, None]
        output = self.joint((weights @ x)[:, 0])
        return Result(output, weights[:, None] if call.need_weights else None)
