"""Modality attention gating, of PILL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.kinds import checked_kinds
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class ModalityGate(SoftmaxAttention):
    """Self-attention over text and other tokens in which the values of the others pass a gate per token and head.

        v_j^h = tanh(W_g x_j)_h W_v^h x_j for a token that is not text, else W_v^h x_j;  W_g is 0 at first

    token_kinds [b, n]: what each token of this pass is, 0 for text and any other number for something else; of padding
    it may be anything. At first a language model reads its text as if the other tokens had values of zero: they still
    take weight.

    Source: Zhang et al., PILL: Plug Into LLM with Adapter Expert and Attention Gate, arXiv:2311.02126. The equation is
    that of the released code, which has one gate for all modalities; its adapters are a model's by_kind=["adapter"].
    """

    card = Card(
        name="modality-gate",
        title="PILL: Plug Into LLM with Adapter Expert and Attention Gate",
        reference="arXiv:2311.02126",
        family=Family.CROSS,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        takes={"token_kinds": "[b, n] integers, what each token is: 0 for text"},
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
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        self.gate = nn.Linear(dim, heads, bias=False)
        nn.init.zeros_(self.gate.weight)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"token_kinds": torch.arange(n)[None] % 3}

    def projected(self, x: Tensor, source: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        kind = checked_kinds(self.card.name, call.inputs["token_kinds"], x, call.padding)
        q, k, v = self.project(x, source)
        open_to = torch.where((kind == 0)[..., None], 1.0, self.gate(x).tanh())
        return q, k, v * open_to.transpose(1, 2)[..., None]
