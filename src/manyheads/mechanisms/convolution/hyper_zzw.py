"""The global HyperZZW operator of Terminator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

EPS = 1e-5


class _SlowNet(nn.Module):
    """A kernel for every place and head, made of the coordinates alone: h_0 = sin(F_0 c),
    h_i = sin(F_i c) (L_i h_(i-1)) + bias at that place, and a last linear layer."""

    def __init__(self, size: int, hidden: int, layers: int, heads: int, omega: float) -> None:
        super().__init__()
        self.size = size
        filters = [nn.Linear(2, hidden) for _ in range(layers + 1)]
        linears = [nn.Linear(hidden, hidden) for _ in range(layers)]
        self.place_bias = nn.Parameter(torch.zeros(size, size))
        self.out = nn.Linear(hidden, heads)
        with torch.no_grad():
            for i, layer in enumerate(filters):
                frequency = torch.distributions.Gamma(6.0 / (i + 1), 1.0).sample((hidden, 2))
                layer.weight.mul_(2 * math.pi * omega * frequency)
                layer.bias.zero_()
            for linear in linears:
                linear.bias.fill_(1.0)
            self.out.weight.div_(size)
            self.out.bias.zero_()
        self.filters, self.linears = nn.ModuleList(filters), nn.ModuleList(linears)

    def forward(self) -> Tensor:
        """[size, size, heads]"""
        line = torch.linspace(-1.0, 1.0, self.size, dtype=self.place_bias.dtype, device=self.place_bias.device)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
        h = self.filters[0](places).sin()
        for filtered, linear in zip(self.filters[1:], self.linears, strict=True):
            h = filtered(places).sin() * linear(h) + self.place_bias[..., None]
        kernel: Tensor = self.out(h)
        return kernel


@register
class HyperZZW(Mechanism):
    """Each row of an image weighs all rows: weights are the row itself times a kernel made of coordinates.

        y_hw = sum_v (K_hv z_hv) z'_vw,   z' = standardise(W_m z),   result W_o y

    per channel: the product of the maps K z and z' as matrices, so that every cell is reached at once and no two cells
    are compared. K comes from a network of the coordinates (multiplied sines), for maps of up to size x size: smaller
    ones read its corner, as if filled up with zeros; larger ones are refused. standardise: zero mean and unit variance
    per image and channel over the real cells. Head h is a group of dim / heads channels that share K; published:
    heads = dim. There is no matrix of weights that channels share.

    Source: Zhang, HyperZZW Operator Connects Slow-Fast Networks, arXiv:2401.17948, and the released HyperZZW_G,
    MAGNet_G and mixer branch. The local branches of the Terminator block are not here: as released their kernels are
    averaged over the batch, so that images change each other.
    """

    card = Card(
        name="hyper-zzw",
        title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
        reference="arXiv:2401.17948",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height^2 width",
        state="",
        decodes=False,
        example={"size": 34, "hidden": 6},
        notes="for maps of up to size x size; the kernel is tied to places",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        size: int = 32,
        hidden: int = 16,
        layers: int = 3,
        omega: float = 10.0,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if size < 1 or hidden < 1 or layers < 1:
            raise ValueError(f"hyper-zzw: size={size}, hidden={hidden}, layers={layers}; want at least 1 of each")
        self.size = size
        self.slow = _SlowNet(size, hidden, layers, heads, omega)
        self.mixer, self.out_proj = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        height, width = x.shape[1:3]
        if max(height, width) > self.size:
            raise ValueError(
                f"hyper-zzw: x has shape {tuple(x.shape)}; its kernel is made for {self.size} x {self.size} cells: "
                f"build it with size={max(height, width)} or more"
            )
        real = torch.ones_like(x[..., :1], dtype=torch.bool) if call.padding is None else call.padding[..., None]
        z = x.masked_fill(~real, 0.0)
        values = _standardise(self.mixer(z), real)
        rows = self.slow()[:height, :width].repeat_interleave(self.head_dim, -1) * z
        both = min(height, width)  # beyond it one of the two maps is zero
        mixed = torch.einsum("bhve,bvwe->bhwe", rows[:, :, :both], values[:, :both])
        return Result(self.out_proj(mixed))


def _standardise(maps: Tensor, real: Tensor) -> Tensor:
    """maps [b, h, w, e] over the real cells [b, h, w, 1]; zero elsewhere."""
    wide = maps.masked_fill(~real, 0.0).to(torch.promote_types(maps.dtype, torch.float32))
    count = real.sum((1, 2), keepdim=True).clamp(min=1).to(wide.dtype)
    centred = (wide - wide.sum((1, 2), keepdim=True) / count).masked_fill(~real, 0.0)
    variance = centred.square().sum((1, 2), keepdim=True) / count
    return (centred / (variance + EPS).sqrt()).to(maps.dtype)
