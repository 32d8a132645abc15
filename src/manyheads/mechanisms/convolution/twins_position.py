"""The positional encoding generator of conditional positional encodings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.cells import convolve, depthwise
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class TwinsPosition(Mechanism):
    """What stands around a cell says where it is: a 3 x 3 convolution of each feature, zeros outside the map.

        y = conv(x);  with the residual that a layer adds, x + y, this is the positional encoding generator

    x: [b, height, width, dim]; padded cells are zeros, as what is outside. In Twins it comes once in each stage, behind
    the first block, without a norm before it. There are no heads.

    Source: Chu et al., Conditional Positional Encodings for Vision Transformers, arXiv:2102.10882, as in
    arXiv:2104.13840.
    Weights: conv is pos_block's proj.0.
    """

    card = Card(
        name="twins-position",
        title="Conditional Positional Encodings for Vision Transformers",
        reference="arXiv:2102.10882",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="n",
        state="",
        decodes=False,
        notes="No attention: it tells those that know no positions where they are.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, kernel: int = 3) -> None:
        super().__init__(dim, heads, causal=causal)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"{self.card.name}: kernel={kernel}; want an odd number")
        self.conv = depthwise(dim, kernel)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        return Result(convolve(self.conv, x, call.padding))
