"""Efficient local attention: gates along the height and along the width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import shown
from manyheads.functional.linear import widen
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

EPS = 1e-5


class _LineNorm(nn.Module):
    """Group normalisation of [b, n, e] over the real places of a line, and a factor and offset per channel."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, line: Tensor, real: Tensor) -> Tensor:
        """real: [b, n, 1]"""
        wide, there = widen(line).unflatten(-1, (self.groups, -1)), real[..., None]
        count = real.sum(1)[:, None, None].clamp(min=1) * wide.shape[-1]
        mean = wide.masked_fill(~there, 0.0).sum((1, 3), keepdim=True) / count
        centred = (wide - mean).masked_fill(~there, 0.0)
        variance = centred.square().sum((1, 3), keepdim=True) / count
        return ((centred * (variance + EPS).rsqrt()).flatten(-2) * self.weight + self.bias).to(line.dtype)


@register
class EfficientLocalAttention(Mechanism):
    """Rows and columns are gated by what a 1-D convolution makes of their means.

        y_hw = x_hw sigmoid(GN(conv(rows)))_h sigmoid(GN(conv(columns)))_w,   rows_h = mean over w of x_hw

    One convolution without bias and one group norm for both directions, as the paper's listing has it. heads: the
    groups of the group norm. together: how many channels a group of the convolution mixes. The paper's ELA-T:
    kernel=5, heads=32; ELA-B: 7, 16; ELA-S: 5, 16, together=8; ELA-L: 7, 16, together=8. Gates belong to cells and
    channels, so that there are no weights from cell to cell.

    Source: Xu and Wan, ELA: Efficient Local Attention for Deep Convolutional Neural Networks, arXiv:2403.01123; no
    official code is published. One common copy of it gives the width's gate to the height, which fails on maps that
    are not square. Means, convolution and norm leave padded cells out.
    """

    card = Card(
        name="efficient-local-attention",
        title="ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
        reference="arXiv:2403.01123",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height width",
        state="",
        decodes=False,
        example={"kernel": 3, "together": 2},
        notes="for images; heads is the number of groups of its norm, 16 or 32 in the paper",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, kernel: int = 7, together: int = 1) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        if kernel < 1 or kernel % 2 == 0 or together < 1 or dim % together:
            raise ValueError(
                f"efficient-local-attention: kernel={kernel}, together={together}; want an odd kernel and a number of "
                f"channels that divides dim={dim}"
            )
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim // together, bias=False)
        self.norm = _LineNorm(dim, heads)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real = call.padding
        x = shown(x, real)
        if real is None:
            real = torch.ones_like(x[:1, ..., 0], dtype=torch.bool)
        return Result(x * self._gate(x, real, 2)[:, :, None] * self._gate(x, real, 1)[:, None])

    def _gate(self, x: Tensor, real: Tensor, axis: int) -> Tensor:
        """The gates [b, n, e] of the lines that are left when `axis` is averaged."""
        count = real.sum(axis)[..., None]
        line = (widen(x).sum(axis) / count.clamp(min=1)).to(x.dtype)
        mixed = self.conv(line.transpose(1, 2)).transpose(1, 2)
        return self.norm(mixed, count > 0).sigmoid()
