"""Modality attention gating, of PILL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.marked import content_width, split_kinds, unmarked
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class ModalityGate(SoftmaxAttention):
    """Self-attention over text and other tokens in which the values of the others pass a gate per token and head.

        v_j^h = tanh(W_g x_j)_h W_v^h x_j for a token that is not text, else W_v^h x_j;  W_g is 0 at first

    At first a language model reads its text as if the other tokens had values of zero: they still take weight.
    x: the last `kinds` features of a token say what it is, the largest wins, the first stands for text. They are not
    attended with, and the output is zero there. Heads share the dim - kinds others, rounded down to a multiple.

    Source: Zhang et al., PILL: Plug Into LLM with Adapter Expert and Attention Gate, arXiv:2311.02126. The equation is
    that of the released code, which has one gate for all modalities; its adapters are layers of the surrounding block.
    """

    card = Card(
        name="modality-gate",
        title="PILL: Plug Into LLM with Adapter Expert and Attention Gate",
        reference="arXiv:2311.02126",
        family=Family.CROSS,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        inputs={"kinds": "what each token is, text or another modality, [b, n]"},
        notes="the last `kinds` features of x mark what each token is",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        kinds: int = 2,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        if kinds < 2:
            raise ValueError(f"modality-gate: kinds={kinds}; want at least 2, text and one modality")
        width, inner = content_width("modality-gate", dim, heads, kinds, "the kind of a token")
        super().__init__(inner, heads, causal=causal, bias=bias, rotary=rotary)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(inner, width, bias=bias)
        self.dim, self.kinds = dim, kinds
        self.gate = nn.Linear(width, heads, bias=False)
        nn.init.zeros_(self.gate.weight)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        content, kind = split_kinds(x, self.kinds)
        q, k, v = super().project(content, content)
        open_to = torch.where((kind == 0)[..., None], 1.0, self.gate(content).tanh())
        return q, k, v * open_to.transpose(1, 2)[..., None]

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        return unmarked(self.o_proj(mixed.transpose(1, 2).flatten(-2)), self.kinds), {}
