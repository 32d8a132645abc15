"""Enhanced multi-head attention: every query head meets every key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where


@register
class EnhancedMultiHead(SoftmaxAttention):
    """Scores of all pairs of query and key heads, merged into one map per head by two small networks.

        S_ij = q_i k_j^T / sqrt(d) for query head i and key head j: heads^2 maps
        T_i = w_i . relu(W_i [S_i1 .. S_ih] + b_i) + c_i        within a query head (inner-subspace interaction)
        U = V_2 relu(V_1 [T_1 .. T_h] + b)                      across heads (cross-subspace interaction)
        head i: softmax(U_i) v_i

    inner: hidden features per query head, by default heads; cross: hidden features across heads, by default 2 heads.
    Source: Zheng et al., EIT, arXiv:2212.10197, whose released repository is empty: this follows the paper, the hidden
    sizes being ours. Masks are applied after the networks, whose biases would lift masked scores. V_2 has no bias,
    which softmax would ignore. The paper has self attention only; nothing in the maps asks for that. Its cheaper E-EIT,
    with one layer in place of each network, is left out.
    """

    shares_kv = False
    card = Card(
        name="eit",
        title="EIT: Enhanced Interactive Transformer",
        reference="arXiv:2212.10197",
        family=Family.MIXING,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2 heads",
        state="n",
        example={"inner": 3, "cross": 6},
        notes="holds heads^2 maps of n x m scores",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        inner: int | None = None,
        cross: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        inner, cross = heads if inner is None else inner, 2 * heads if cross is None else cross
        if inner < 1 or cross < 1:
            raise ValueError(f"eit: inner={inner}, cross={cross}; want at least one hidden feature each")
        # Grouped 1 x 1 convolutions over [b, channels, n, m]; channels of a query head lie together.
        self.inner_in = nn.Conv2d(heads * heads, heads * inner, 1, groups=heads)
        self.inner_out = nn.Conv2d(heads * inner, heads, 1, groups=heads)
        self.cross_in = nn.Conv2d(heads, cross, 1)
        self.cross_out = nn.Conv2d(cross, heads, 1, bias=False)

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        maps = torch.einsum("bind,bjmd->bijnm", q * self.scale, k).flatten(1, 2)
        inner = self.inner_out(self.inner_in(maps).relu())
        return self.cross_out(self.cross_in(inner).relu())
