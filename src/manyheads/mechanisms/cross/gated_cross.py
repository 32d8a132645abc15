"""Gated cross attention, as in Flamingo and NVLM-X."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class GatedCross(SoftmaxAttention):
    """Cross attention of text to images behind a gate that starts closed: a language model is at first unchanged.

        tanh(g) W_o softmax(q k^T / sqrt(d)) v,  q from the text x, k and v from the images; g one scalar, 0 at first

    The result is to be added to x. NVLM-X puts its image tiles end to end in the context; the text token that tags a
    tile sees that tile only, which a dense mask [batch, 1, n, m] says. NVLM-H puts a thumbnail among the text, where
    plain causal self-attention reads it, and only the tiles here.

    Source: Dai et al., NVLM, arXiv:2409.11402, gated cross attention as in Flamingo (arXiv:2204.14198), without
    Flamingo's resampler. The gated feed-forward layer that follows belongs to the surrounding block.
    """

    card = Card(
        name="gated-cross",
        title="NVLM: Open Frontier-Class Multimodal LLMs",
        reference="arXiv:2409.11402",
        family=Family.CROSS,
        patterns={"noncausal-cross", "causal-cross"},
        time="n m",
        state="1",
        notes="gives exactly zero until its gate has been trained",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, kv_heads: int | None = None, bias: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias)
        self.gate = nn.Parameter(torch.zeros(1))

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.gate.tanh() * self.o_proj(mixed.transpose(1, 2).flatten(-2)), {}
