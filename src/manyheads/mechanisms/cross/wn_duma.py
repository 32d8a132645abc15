"""Stacked dual co-attention, of WN-DUMA."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class WnDuma(SoftmaxAttention):
    """Two texts read each other in turn, through one attention whose result is added and normed.

        A(x, c) = LN(x + W_o concat_h softmax(q k^T / sqrt(d)) v),  q from x, k and v from c
        a layer: answer <- A(answer, passage), then passage <- A(passage, answer), with the new answer and the same A

    One module is one such A: call it twice. DUMA computes both sides from the states before the layer; here the second
    reads what the first wrote. The result is A(x, c), residual and norm included. WordNet's definitions of the answer
    are tokens of its text, and the mean of each side over its tokens is what a classifier reads.

    Source: Jiang et al., XRJL-HKUST at SemEval-2021 Task 4, arXiv:2103.16102, and its released CoAttention.py and
    Model.py (one set of weights for both sides), after DUMA (arXiv:2001.09415). Without dropout.
    """

    card = Card(
        name="wn-duma",
        title="XRJL-HKUST at SemEval-2021 Task 4: WordNet-Enhanced Dual Multi-head Co-Attention for Reading "
        "Comprehension of Abstract Meaning",
        reference="arXiv:2103.16102",
        family=Family.CROSS,
        patterns={"noncausal-cross"},
        time="n m",
        state="",
        decodes=False,
        notes="the residual and the norm are inside",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.norm(x + self.o_proj(mixed.transpose(1, 2).flatten(-2))), {}
