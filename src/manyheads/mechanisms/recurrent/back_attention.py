"""Back attention: lower layers read higher ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class BackAttention(SoftmaxAttention):
    """A lower layer asks what a higher layer already knows at this and earlier tokens, so that a fact found late in
    depth can be used for the next hop.

        softmax over j <= i of (W_q low_i) . (W_k high_j) / sqrt(d), times W_v high_j, then W_o

    x [b, n, dim] holds both: the last `side_dim` features are the higher layer's hidden states, of a pass made before,
    and the dim - side_dim first are the lower layer's. The output is to be added to x: it is W_o's in the lower part,
    and zero in the higher. d = (dim - side_dim) / heads. Then the layers above the lower one are computed again.
    Source: Yu, Belinkov, Ananiadou, arXiv:2502.10835: queries of the lower layer, keys and values of the higher one at
    all positions, added back to the lower. Read from its abstract and summaries, as the code that it names was not at
    hand; heads, scale and causality are those of the attention that it stands beside. rotary: of queries and keys, off
    by default.
    """

    card = Card(
        name="back-attention",
        title="Back Attention: Understanding and Enhancing Multi-Hop Reasoning in Large Language Models",
        reference="arXiv:2502.10835",
        family=Family.RECURRENT,
        patterns={"causal-self"},
        time="n^2",
        state="n",
        example={"side_dim": 8},
        inputs={"higher": "the higher layer's hidden states, [b, n, side_dim], of a pass made before"},
        notes="Needs the higher layer's hidden states beside the lower layer's, and so a first pass through both.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        side_dim: int | None = None,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        side = dim // 2 if side_dim is None else side_dim
        low = dim - side
        if side < 1 or low < 1 or low % heads:
            raise ValueError(
                f"back-attention: dim={dim}, side_dim={side_dim}, heads={heads}; want side_dim >= 1 (None: dim // 2) "
                f"and dim - side_dim = {low}, the lower layer's width, to be a positive multiple of heads"
            )
        # The shell's own sizes are the lower layer's.
        super().__init__(low, heads, causal=causal, bias=bias, rotary=rotary)
        self.dim, self.side_dim = dim, side
        self.k_proj, self.v_proj = (nn.Linear(side, low, bias=bias) for _ in range(2))

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = x[..., : -self.side_dim], source[..., -self.side_dim :]
        q, k, v = (
            t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for t in (self.q_proj(low), self.k_proj(high), self.v_proj(high))
        )
        return q, k, v

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        return F.pad(self.o_proj(mixed.transpose(1, 2).flatten(-2)), (0, self.side_dim)), {}
