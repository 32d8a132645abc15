"""Kernels made of coordinates (Zhang, HyperZZW Operator Connects Slow-Fast Networks, arXiv:2401.17948), and the means
and standardisations over real cells that go with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.functional.layers import call_in
from manyheads.functional.precision import unit

EPS = 1e-5


class SlowNet(nn.Module):
    """A kernel for every place and head, made of the coordinates: h_0 = sin(F_0 c),
    h_i = sin(F_i c) (L_i h_(i-1)) + bias at that place, and a last linear layer. With scales s_i, maps [b, size, size,
    hidden], h_i becomes s_i (h_i + h_i / (10 |h_i|)), the norm over the places of a feature. axes: 2 for places of a
    map, 1 for those of a line."""

    def __init__(self, size: int, hidden: int, layers: int, heads: int, omega: float, axes: int = 2) -> None:
        super().__init__()
        self.size, self.axes = size, axes
        filters = [nn.Linear(axes, hidden) for _ in range(layers + 1)]
        linears = [nn.Linear(hidden, hidden) for _ in range(layers)]
        self.place_bias = nn.Parameter(torch.zeros((size,) * axes))
        self.out = nn.Linear(hidden, heads)
        with torch.no_grad():
            for i, layer in enumerate(filters):
                # Where there are numbers, in a dtype that has such draws, whatever the layers are built in and on.
                shape, rate = torch.tensor([6.0 / (i + 1), 1.0], dtype=torch.float32, device="cpu")
                frequency = torch.distributions.Gamma(shape, rate).sample((hidden, axes)).to(layer.weight)
                layer.weight.mul_(2 * math.pi * omega * frequency)
                layer.bias.zero_()
            for linear in linears:
                linear.bias.fill_(1.0)
            self.out.weight.div_(size ** (axes / 2))
            self.out.bias.zero_()
        self.filters, self.linears = nn.ModuleList(filters), nn.ModuleList(linears)

    def forward(self, scales: Sequence[Tensor] = ()) -> Tensor:
        """[size, size, heads] ([size, heads] for a line), with scales [b, size, size, heads]"""
        # Half precision has too few digits for sines of so high frequencies.
        wide = torch.promote_types(self.place_bias.dtype, torch.float32)
        line = torch.linspace(-1.0, 1.0, self.size, dtype=wide, device=self.place_bias.device)
        places = torch.stack(torch.meshgrid(*[line] * self.axes, indexing="ij"), -1)
        made = self._made(places, [scale.to(wide) for scale in scales])
        return made.to(self.place_bias.dtype)

    def _made(self, places: Tensor, scales: Sequence[Tensor]) -> Tensor:
        h = call_in(self.filters[0], places).sin()
        for i, (filtered, linear) in enumerate(zip(self.filters[1:], self.linears, strict=True)):
            h = call_in(filtered, places).sin() * call_in(linear, h) + self.place_bias[..., None]
            if scales:
                h = scales[i] * (h + 0.1 * unit(h.flatten(-3, -2), -2).view_as(h))
        return call_in(self.out, h)


def pool_bins(maps: Tensor, real: Tensor, size: int) -> Tensor:
    """Means of the real cells in size x size bins over the extent of the real cells, [b, size, size, e]; as adaptive
    average pooling where all is real. maps: zero where not real."""
    wide = torch.promote_types(maps.dtype, torch.float32)
    rows, columns = (_bins(real.any(axis)[..., 0], size).to(wide) for axis in (2, 1))
    sums, counts = (torch.einsum("bih,bhwe,bjw->bije", rows, part.to(wide), columns) for part in (maps, real))
    return (sums / counts.clamp(min=1)).to(maps.dtype)


def _bins(used: Tensor, size: int) -> Tensor:
    """used [b, n]: which rows have a real cell -> which belong to which of `size` bins, [b, size, n]. Neighbouring
    bins overlap where the extent, up to the last row used, is not a multiple of size."""
    at = torch.arange(used.shape[1], device=used.device)
    extent = ((at + 1) * used).amax(1)[:, None, None]
    bin_ = torch.arange(size, device=used.device)[:, None]
    first, end = bin_ * extent // size, ((bin_ + 1) * extent + size - 1) // size
    return (at >= first) & (at < end)


def standardise(maps: Tensor, real: Tensor) -> Tensor:
    """maps [b, h, w, e] over the real cells [b, h, w, 1]; zero elsewhere."""
    wide = maps.masked_fill(~real, 0.0).to(torch.promote_types(maps.dtype, torch.float32))
    count = real.sum((1, 2), keepdim=True).clamp(min=1).to(wide.dtype)
    centred = (wide - wide.sum((1, 2), keepdim=True) / count).masked_fill(~real, 0.0)
    variance = centred.square().sum((1, 2), keepdim=True) / count
    return (centred / (variance + EPS).sqrt()).to(maps.dtype)


def filter_each(maps: Tensor, windows: Tensor) -> Tensor:
    """maps [b, h, w, e], zero where nothing is real, windows [b, size, size, heads]: every channel of every image by
    the window of its head."""
    kernels = windows.repeat_interleave(maps.shape[-1] // windows.shape[-1], -1).permute(0, 3, 1, 2).flatten(0, 1)
    stacked = maps.permute(0, 3, 1, 2).flatten(0, 1)
    filtered = F.conv2d(stacked[None], kernels[:, None], padding=windows.shape[1] // 2, groups=len(kernels))
    return filtered[0].unflatten(0, (len(maps), -1)).permute(0, 2, 3, 1)
