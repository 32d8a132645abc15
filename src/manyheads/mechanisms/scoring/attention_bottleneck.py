"""Transformer attention bottleneck: all that a model sees passes through one row of attention, which may be edited."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, grouped_scores, masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class AttentionBottleneck(Mechanism):
    """A class token attends to itself and to the patches, and only what it takes from the patches goes on.

        [a_0, a_1 .. a_m] = softmax([q . k_cls, q . k_1 .. q . k_m] / sqrt(d));  y = W_o sum_{j >= 1} a_j v_j

    The attention over patches sums to 1 - a_0, in [0, 1]: a head that finds nothing says so, and at 0 no patch has any
    influence. There must be no skip connection around it. The paper has one head.
    x: [class token, patches], [b, n, dim] -> [b, dim].
    `from_attention(attention, patches)` gives the output for attention that a user has edited.
    Source: Rahmanzadehgervi et al., arXiv:2412.18675. Its released code multiplies the whole row by 1 - a_0 instead,
    and keeps the class token's own value; this follows the paper, where that weight is thrown away.
    """

    card = Card(
        name="attention-bottleneck",
        title="TAB: Transformer Attention Bottlenecks enable User Intervention and Debugging in Vision-Language Models",
        reference="arXiv:2412.18675",
        family=Family.SCORING,
        patterns={"pool"},
        time="n",
        state="",
        decodes=False,
        notes="a pool: the result has no time axis to decode along",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        self.scale = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "attention-bottleneck: a dense mask was given to a pool, which has one query; give key padding "
                "[batch, n] as the mask"
            )
        q, k = self._heads(self.q_proj(x[:, :1])), self._heads(self.k_proj(x))
        allowed = None if call.padding is None else call.padding[:, None, None, :]
        patches = masked_softmax(grouped_scores(q * self.scale, k), allowed)[..., 1:]
        # Without a patch nothing is mixed, and a class token of NaN is still to be seen.
        output = self.from_attention(patches, x[:, 1:]) + (x[:, :1] * 0).sum(-1, keepdim=True)
        return Result(output[:, 0], F.pad(patches, (1, 0)) if call.need_weights else None)

    def from_attention(self, attention: Tensor, patches: Tensor) -> Tensor:
        """attention [b, heads, n, m], patches [b, m, dim] -> [b, n, dim]; what a pass gives for its own weights."""
        mixed = grouped_mix(attention, self._heads(self.v_proj(patches)))
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
