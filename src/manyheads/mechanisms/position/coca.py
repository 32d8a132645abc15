"""Collinear constrained attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary, rotate
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class CoCA(SoftmaxAttention):
    """The key that a query meets is that query, scaled: rotary embedding turns an angle that starts at zero.

        k_ns = q_n * t_s,  t_s = relu((T_1 x_s + T_2 x_s) / 2) >= 0, one value per rotary pair,
        score(n, s) = R_n q_n . R_s k_ns / sqrt(d) = sum over pairs p of t_sp |q_np|^2 cos((n - s) theta_p) / sqrt(d)

    The sum is a dot product of (|q|^2, 0) turned by n and (t, 0) turned by s, so that no key per pair of tokens is
    held and PyTorch's kernel does the rest. Pairs are (i, i + d/2).
    released: the score of the released code, sum q_n * R_n q_n * R_s t_s, which turns t instead of the key: it changes
    when all positions are shifted. The default is the paper's.
    Source: Zhu et al., Cure the Headache of Transformers via Collinear Constrained Attention, arXiv:2309.08646, and
    its code (the mean of the two halves of T x is the code's). Without causality it is not in the paper.
    Weights: k_proj is t_proj.
    """

    card = Card(
        name="coca",
        title="Cure the Headache of Transformers via Collinear Constrained Attention",
        reference="arXiv:2309.08646",
        family=Family.POSITION,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        parallel="ring",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        kv_heads: int | None = None,
        base: float = 10000.0,
        released: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=Rotary(base=base))
        if self.head_dim % 2:
            raise ValueError(f"coca: dim={dim} over heads={heads} gives {self.head_dim} features per head; want even")
        self.released = released

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, source)
        first, second = k.chunk(2, -1)
        t = ((first + second) / 2).relu()
        return q, torch.cat([t, t if self.released else torch.zeros_like(t)], -1), v

    def position(self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
        rotary: Any = self.rotary
        if self.released:
            return q * rotate(q, query_positions, rotary), rotate(k, key_positions, rotary)
        first, second = q.chunk(2, -1)
        squared = first.square() + second.square()
        q = torch.cat([squared, torch.zeros_like(squared)], -1)
        return rotate(q, query_positions, rotary), rotate(k, key_positions, rotary)
