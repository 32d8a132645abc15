"""Linformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

SHARING = ("none", "headwise", "kv")


@register
class Linformer(Mechanism):
    """Attention over a fixed number k of learned combinations of the tokens instead of over the tokens.

        softmax(Q_i (E_i X W_i^K)^T / sqrt(d)) F_i X W_i^V  per head i;  E_i, F_i: [k, max_length], cut to the length m

    sharing: which E, F are one: "none", "headwise" (E_i = E, F_i = F), "kv" (headwise, and E = F); for one E in all
    layers, give their `key_mix` the same parameter. Padded tokens are zero before the projection over time. A causal
    form does not exist: every combination holds every token.
    Matrix: softmax(..) F_i, over tokens; entries may be negative. With bias=True the bias of W^V is beside them.

    Source: Wang et al., Linformer: Self-Attention with Linear Complexity, arXiv:2006.04768. As in the released code the
    time axis is compressed before W^K and W^V, so that their biases are not; it offers headwise and kv, and compresses
    padded tokens along with the others, which this file does not.
    Weights: key_mix, value_mix are compress_k.weight, compress_v.weight with an axis of heads in front.
    """

    card = Card(
        name="linformer",
        title="Linformer: Self-Attention with Linear Complexity",
        reference="arXiv:2006.04768",
        family=Family.TOKENS,
        patterns={"noncausal-self", "noncausal-cross"},
        time="n compressed_length",
        state="",
        decodes=False,
        example={"max_length": 48, "compressed_length": 5},
        notes="no causal form: each compressed token holds the whole sequence",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        max_length: int = 1024,
        compressed_length: int = 128,
        sharing: str = "headwise",
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if sharing not in SHARING:
            raise ValueError(f"{self.card.name}: sharing={sharing!r}; want one of {list(SHARING)}")
        if not 1 <= compressed_length <= max_length:
            raise ValueError(
                f"{self.card.name}: compressed_length={compressed_length}, max_length={max_length}; "
                "want 1 <= compressed_length <= max_length"
            )
        self.max_length = max_length
        shape = (heads if sharing == "none" else 1, compressed_length, max_length)
        self.key_mix = nn.Parameter(torch.empty(shape))
        self.value_mix = None if sharing == "kv" else nn.Parameter(torch.empty(shape))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        for mix in (self.key_mix, self.value_mix):
            for each in () if mix is None else mix:
                nn.init.xavier_uniform_(each, gain=2**-0.5)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        source = x if context is None else context
        m = source.shape[1]
        if m > self.max_length:
            raise ValueError(
                f"{self.card.name}: {m} tokens in {'x' if context is None else 'the context'} of shape "
                f"{tuple(source.shape)}, but it was built with max_length={self.max_length}; "
                "build it with a larger one, or shorten the input"
            )
        if call.dense is not None:
            raise ValueError(
                f"{self.card.name}: a dense mask was given, but its keys are mixtures of all tokens; "
                "give key padding [batch, m] as the mask"
            )
        if call.padding is not None:
            source = source.masked_fill(~call.padding[..., None], 0.0)
        value_mix = self.key_mix if self.value_mix is None else self.value_mix
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k = self._compress(source, self.key_mix, self.k_proj)
        v = self._compress(source, value_mix, self.v_proj)
        if call.padding is not None and self.v_proj.bias is not None:
            v = v * call.padding.any(1)[:, None, None, None]  # no token at all: nothing, the bias neither
        mixed, weights = attend_weighted(q, k, v, None, scale=self.head_dim**-0.5, need_weights=call.need_weights)
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        if weights is None:
            return Result(output)
        over_tokens = weights @ value_mix[..., :m]
        if call.padding is not None:
            over_tokens = over_tokens.masked_fill(~call.padding[:, None, None, :], 0.0)
        return Result(output, over_tokens)

    def _compress(self, source: Tensor, mix: Tensor, projection: nn.Linear) -> Tensor:
        """source [b, m, e] over time with mix [1 or h, k, max_length], then projected: [b, h, k, d]."""
        short = mix[..., : source.shape[1]] @ source[:, None]
        heads = (self.heads, self.head_dim)
        projected = short @ projection.weight.unflatten(0, heads).transpose(1, 2)
        return projected if projection.bias is None else projected + projection.bias.view(heads)[:, None]
