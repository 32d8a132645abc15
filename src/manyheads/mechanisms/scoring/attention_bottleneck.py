"""Transformer attention bottleneck: all that a model sees passes through one row of attention, which may be edited."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, grouped_scores, masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class AttentionBottleneck(Mechanism):
    """A class token attends to itself and to the patches, and the patches' share of its attention gates the whole.

        [a_0, a_1 .. a_m] = softmax([q . k_0, q . k_1 .. q . k_m] / sqrt(d));  g = a_1 + .. + a_m = 1 - a_0
        y = W_o g sum_{j >= 0} a_j v_j,  token 0: the class token

    The weights of the patches sum to g^2, in [0, 1]: a head that finds nothing says so, and at 0 nothing passes. There
    must be no skip connection around it. The paper has one head.
    Pool: x is [class token, patches], [b, n, dim] -> [b, dim]. Cross, the co-attention of two images: x, [b, n, dim],
    are class tokens of one image (published: n = 1), the context is [class token, patches] of the other.
    `from_attention(attention, tokens)` gives the output for weights that a user has edited.
    Source: Rahmanzadehgervi et al., arXiv:2412.18675 (A' = A sum_{j >= 1} A_j), and its released gated_coattention,
    which attends from one image to the other. The code returns weights as they are before the gate, here they are those
    that mix; its rows of patches, computed without a gate and then dropped, are left out.
    """

    card = Card(
        name="attention-bottleneck",
        title="TAB: Transformer Attention Bottlenecks enable User Intervention and Debugging in Vision-Language Models",
        reference="arXiv:2412.18675",
        family=Family.SCORING,
        patterns={"pool", "noncausal-cross"},
        time="n m",
        state="",
        decodes=False,
        notes="the first token of what is read is the class token; a pool has no time axis to decode along",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        self.scale = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if context is None and call.dense is not None:
            raise ValueError(
                "attention-bottleneck: a dense mask was given to a pool, which has one query; give key padding "
                "[batch, n] as the mask"
            )
        queries, tokens = (x[:, :1], x) if context is None else (x, context)
        q, k = self._heads(self.q_proj(queries)), self._heads(self.k_proj(tokens))
        allowed = call.dense if call.padding is None else call.padding[:, None, None, :]
        attention = masked_softmax(grouped_scores(q * self.scale, k), allowed)
        attention = attention * attention[..., 1:].sum(-1, keepdim=True)
        output = self.from_attention(attention, tokens)
        return Result(output[:, 0] if context is None else output, attention if call.need_weights else None)

    def from_attention(self, attention: Tensor, tokens: Tensor) -> Tensor:
        """attention [b, heads, n, m], tokens [b, m, dim] -> [b, n, dim]; what a pass gives for its own weights."""
        mixed = grouped_mix(attention, self._heads(self.v_proj(tokens)))
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
