"""Scaled dot-product attention."""

from __future__ import annotations

from manyheads.card import Card, Family
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class Softmax(SoftmaxAttention):
    """Every query weighs every value by the softmax of scaled dot products with the keys.

        softmax(q_i . k_j / sqrt(d)) v_j, summed over j, for each head; heads are concatenated and projected.

    Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762. No projection has a bias unless asked for.
    """

    card = Card(
        name="softmax",
        title="Attention Is All You Need",
        reference="arXiv:1706.03762",
        family=Family.PLAIN,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2",
        state="n",
        parallel="ring",
    )
