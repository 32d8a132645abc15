"""Back attention: lower layers read higher ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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

    x [b, n, dim]: the lower layer's hidden states. higher [b, n, side_dim]: the higher layer's, for the tokens of this
    pass, of a pass made before. The output is to be added to x; then the layers above the lower one are computed again:
    a model does both as ManyheadsConfig(back="back-attention", back_layers=(lower, higher)).
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
        takes={"higher": "[b, n, side_dim], the higher layer's hidden states, of a pass made before"},
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
        self.side_dim = dim if side_dim is None else side_dim
        if self.side_dim < 1:
            raise ValueError(f"back-attention: side_dim={side_dim}; want at least 1 (None: dim, {dim})")
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        self.k_proj, self.v_proj = (nn.Linear(self.side_dim, dim, bias=bias) for _ in range(2))

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"higher": torch.sin(torch.arange(n * self.side_dim) * 0.7).view(1, n, self.side_dim)}

    def projected(self, x: Tensor, source: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        higher, wanted = call.inputs["higher"], (*x.shape[:2], self.side_dim)
        if not isinstance(higher, Tensor) or higher.shape != wanted or higher.device != x.device:
            what = f"{list(higher.shape)} on {higher.device}" if isinstance(higher, Tensor) else repr(higher)[:80]
            raise ValueError(f"back-attention: higher is {what}; want {list(wanted)} on {x.device}")
        return self.project(x, higher)
