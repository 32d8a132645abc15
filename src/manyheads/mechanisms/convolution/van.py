"""Large kernel attention, of Visual Attention Networks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import convolve, shown
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class LargeKernelAttention(Mechanism):
    """A convolution of a large kernel, cut into three cheap ones, gates each cell and channel.

        u = GELU(W_1 x);   y = x + W_2 (u * W_c DWConv_dilated(DWConv(u)))

    DWConv: (2 dilation - 1) squared; DWConv_dilated: ceil(kernel / dilation) squared at that dilation; published: 21
    and 3, so that they are 5 x 5 and 7 x 7. No sigmoid, no softmax. The sum with x is inside, as in the released
    attention module, whose x is the output of a BatchNorm; norm, layer scale and residual of the block are around it.
    heads has no meaning here and changes nothing. There are no weights from cell to cell.

    Source: Guo et al., Visual Attention Network, arXiv:2202.09741, and the released models/van.py. Padded cells read as
    zeros in each of the convolutions, whose biases make them more than zero.
    Weights: proj_1, proj_2, spatial_gating_unit.conv1 (here point) without their last two axes; conv0 is near,
    conv_spatial is far.
    """

    card = Card(
        name="large-kernel-attention",
        title="Visual Attention Network",
        reference="arXiv:2202.09741",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height width",
        state="",
        decodes=False,
        example={"kernel": 9, "dilation": 2},
        notes="for images; reaches as far as its kernel and no further",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, kernel: int = 21, dilation: int = 3, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        taps = -(-kernel // dilation) if dilation > 0 else 0
        if taps < 1 or taps % 2 == 0:
            raise ValueError(
                f"large-kernel-attention: kernel={kernel}, dilation={dilation}; want a dilation of at least 1 and "
                f"ceil(kernel / dilation) odd, not {taps}"
            )
        near = 2 * dilation - 1
        self.proj_1, self.proj_2 = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.near = nn.Conv2d(dim, dim, near, padding=near // 2, groups=dim, bias=bias)
        self.far = nn.Conv2d(dim, dim, taps, padding=taps // 2 * dilation, dilation=dilation, groups=dim, bias=bias)
        self.point = nn.Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real = call.padding
        x = shown(x, real)
        u = F.gelu(self.proj_1(x))
        gate = self.point(convolve(self.far, convolve(self.near, u, real), real))
        return Result(x + self.proj_2(u * gate))
