"""Deformable convolution, plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeformedConv2d(nn.Module):
    """A convolution that reads each of its taps at a place which another convolution moves.

        y[p] = b + sum_k W_k x(stride p - padding + k + offset_k[p]),  offset = conv(x), of the same kernel and stride

    x(place) is interpolated between the four cells around it, cells outside the map being zero. Offsets begin at zero.
    x: [b, features, height, width], as of nn.Conv2d.

    Source: Dai et al., Deformable Convolutional Networks, arXiv:1703.06211, without modulation and in one group.
    Weights: offset is conv_offset, whose features are, for each tap in reading order, the step down and the step right.
    """

    def __init__(self, dim: int, features: int, kernel: int, stride: int, padding: int, *, bias: bool = True) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        plain = nn.Conv2d(dim, features, kernel, bias=bias)
        self.weight, self.bias = plain.weight, plain.bias
        self.offset = nn.Conv2d(dim, 2 * kernel**2, kernel, stride, padding)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        moved = self.offset(x).unflatten(1, (self.kernel**2, 2))  # [b, taps, 2, rows, columns]
        tap = torch.arange(self.kernel, device=x.device)
        rows, columns = (torch.arange(side, device=x.device) * self.stride - self.padding for side in moved.shape[-2:])
        down = moved[:, :, 0] + (tap.repeat_interleave(self.kernel)[:, None, None] + rows[:, None]).to(x.dtype)
        right = moved[:, :, 1] + (tap.repeat(self.kernel)[:, None, None] + columns).to(x.dtype)
        read = between_cells(x, down, right)  # [b, features, taps, rows, columns]
        output = torch.einsum("bctij,oct->boij", read, self.weight.flatten(2))
        return output if self.bias is None else output + self.bias[:, None, None]


def between_cells(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """x [b, features, height, width] at the places down, right [b, *places], interpolated, zero outside -> [b,
    features, *places]."""
    height, width = x.shape[2:]
    top, left = down.floor(), right.floor()
    # One row and column of zeros around the map: what lies further outside than that is moved onto them.
    flat = F.pad(x, (1, 1, 1, 1)).flatten(2)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for i in (0, 1):
        for j in (0, 1):
            row, column = (top + i).clamp(-1, height), (left + j).clamp(-1, width)
            share = (1 - (down - top - i).abs()) * (1 - (right - left - j).abs())
            cell = ((row + 1) * (width + 2) + column + 1).long().flatten(1)
            found = flat.gather(2, cell[:, None].expand(-1, flat.shape[1], -1)).unflatten(2, tuple(down.shape[1:]))
            total = total + found * share[:, None]
    return total
