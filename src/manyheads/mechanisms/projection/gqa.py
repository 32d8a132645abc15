"""Grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class GQA(SoftmaxAttention):
    """Groups of query heads share a key/value head: between multi-head (kv_heads = heads) and multi-query (1).

        softmax(q_i^h . k_j^g / sqrt(d)) v_j^g, summed over j, with g = floor(h kv_heads / heads).

    kv_heads: divides heads; by default the largest divisor of heads that is at most heads / 2.
    Source: Ainslie et al., arXiv:2305.13245. Groups are neighbouring query heads, as in the released code of Llama.
    """

    card = Card(
        name="gqa",
        title="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        reference="arXiv:2305.13245",
        family=Family.PROJECTION,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2",
        state="n kv_heads / heads",
        parallel="ring",
        example={"kv_heads": 2},
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        if kv_heads is None:
            kv_heads = max((g for g in range(1, heads // 2 + 1) if heads % g == 0), default=1)
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)
