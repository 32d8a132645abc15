"""Multi-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class MQA(SoftmaxAttention):
    """All query heads share one key head and one value head, so that the cache shrinks by the number of heads.

        softmax(q_i^h . k_j / sqrt(d)) v_j, summed over j.

    Source: Shazeer, Fast Transformer Decoding: One Write-Head is All You Need, arXiv:1911.02150.
    """

    card = Card(
        name="mqa",
        title="Fast Transformer Decoding: One Write-Head is All You Need",
        reference="arXiv:1911.02150",
        family=Family.PROJECTION,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2",
        state="n / heads",
        parallel="ring",
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
        super().__init__(dim, heads, causal=causal, kv_heads=1, bias=bias, rotary=rotary)
