"""Conditional attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class ConditionalAttention(Mechanism):
    """What a text is for (its genre, its readers) turns the scores of its words up, down or around before the softmax.

        a = softmax over t of (w . tanh(h_t)) (u . c);   y = [sum_t a_t h_t, c]

    x: [b, n, dim], at each word its state h_t (a GRU's in the paper); condition: [b, side_dim], c of each text
    (embedded genre and one-hot gender in the paper) -> [b, dim + side_dim]; weights: [b, 1, 1, n]. One distribution:
    heads is 1.

    Source: Kitada et al., Conversion Prediction Using Multi-task Conditional Attention Networks to Support the Creation
    of Effective Ad Creatives, arXiv:1905.07289, as in its released gru.py, which pools title and text apart, with one
    u. Left out: the bias beside w, which softmax cancels.
    """

    card = Card(
        name="conditional-attention",
        title="Conversion Prediction Using Multi-task Conditional Attention Networks to Support the Creation of "
        "Effective Ad Creative",
        reference="arXiv:1905.07289",
        family=Family.POOLING,
        patterns={"pool"},
        time="n",
        state="",
        decodes=False,
        example={"heads": 1, "side_dim": 4},
        takes={"condition": "[b, side_dim], what is known of the whole text beside its words"},
    )

    def __init__(self, dim: int, heads: int = 1, *, causal: bool = False, side_dim: int = 8) -> None:
        super().__init__(dim, heads, causal=causal)
        if heads != 1:
            raise ValueError(f"conditional-attention: heads={heads}; it has one distribution, want heads=1")
        if side_dim < 1:
            raise ValueError(f"conditional-attention: side_dim={side_dim}; want at least 1")
        self.side_dim, self.result_dim = side_dim, dim + side_dim
        self.word = nn.Linear(dim, 1, bias=False)
        self.condition = nn.Linear(side_dim, 1, bias=False)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "conditional-attention pools x into one vector: a dense mask was not expected; give key padding "
                "[batch, n] as the mask"
            )
        if call.padding is not None:
            x = x.masked_fill(~call.padding[..., None], 0.0)
        condition, wanted = call.inputs["condition"], (x.shape[0], self.side_dim)
        if not isinstance(condition, Tensor) or condition.shape != wanted or condition.device != x.device:
            given = list(condition.shape) if isinstance(condition, Tensor) else repr(condition)[:80]
            raise ValueError(f"conditional-attention: condition is {given}; want {list(wanted)} on {x.device}")
        scores = self.word(torch.tanh(x))[..., 0] * self.condition(condition)
        weights = masked_softmax(scores, call.padding)[:, None]
        pooled = torch.cat([(weights @ x)[:, 0], condition], -1)
        return Result(pooled, weights[:, None] if call.need_weights else None)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"condition": torch.linspace(-1, 2, self.side_dim)[None]}
