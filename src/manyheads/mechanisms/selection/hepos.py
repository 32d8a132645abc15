"""Head-wise positional strides."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.grouped import attend_grouped, attend_masked
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where


@register
class Hepos(SoftmaxAttention):
    """Cross attention in which each head reads every stride-th source token, each head from another start.

        softmax over j with j mod stride = h mod stride of (q_i^h . k_j^h / sqrt(d)), times v_j^h

    `stride` heads together read the whole source once; a full head would cost stride times as much. With stride = heads
    each token is read by one head. A source shorter than the stride leaves some heads with nothing: they give zero.

    Source: arXiv:2104.02112. The released code fills the source up to a multiple of the stride with zeros, a whole
    stride of them even where it fits, and lets heads attend to those; here nothing is added.
    """

    shares_kv = False
    card = Card(
        name="hepos",
        title="Efficient Attentions for Long Document Summarization",
        reference="arXiv:2104.02112",
        family=Family.SELECTION,
        patterns={"noncausal-cross", "causal-cross"},
        time="n m / stride",
        state="1",
        example={"stride": 2},
        notes="for the cross attention of a decoder to a long source",
    )

    def __init__(self, dim: int, heads: int, *, stride: int = 4, causal: bool = False, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        if not 1 <= stride <= heads:
            raise ValueError(
                f"{self.card.name}: stride={stride} with heads={heads}; want 1 <= stride <= heads: every source "
                "token is to be read by some head"
            )
        self.stride = stride

    def mask_mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j % self.stride == h % self.stride

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        if where.dense is not None:
            return super().fused(q, k, v, where)
        mixed = torch.zeros_like(q)
        for start in range(min(self.stride, k.shape[2])):
            heads, tokens = slice(start, None, self.stride), slice(start, None, self.stride)
            part = (q[:, heads], k[:, heads, tokens], v[:, heads, tokens])
            if where.padding is None:
                mixed[:, heads] = attend_grouped(*part, scale=self.scale)
            else:
                mixed[:, heads] = attend_masked(*part, where.padding[:, None, None, tokens], scale=self.scale)
        return mixed
