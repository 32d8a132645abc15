"""Progressive multi-scale attention autoencoder: its block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, convolve, shown
from manyheads.functional.feature_maps import averaged, extent, rectangle, resized
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

Region = tuple[Tensor | None, Tensor | None]  # what is real of a map, and its extent


class _Separable(nn.Module):
    """norm(W relu(norm(conv(x)))), and x added where `skip`."""

    def __init__(self, wide: int, dim: int, kernel: int, *, stride: int = 1, groups: int = 1, skip: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(wide, wide, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
        self.norm, self.point = CellNorm(wide), nn.Linear(wide, dim, bias=False)
        self.norm_out, self.skip = CellNorm(dim), skip

    def forward(self, x: Tensor, real: Tensor | None, into: Tensor | None) -> Tensor:
        h = F.relu(self.norm(convolve(self.conv, x, real), into))
        h = self.norm_out(self.point(h), into)
        return x + h if self.skip else h


class _Injection(nn.Module):
    """norm(conv(fine)) up(sigmoid(norm(conv(coarse)))) + up(norm(conv(coarse))), depthwise, up by the nearest cell."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False) for _ in range(3)
        )
        self.norms = nn.ModuleList(CellNorm(dim) for _ in range(3))

    def forward(self, fine: Tensor, coarse: Tensor, region: Region, other: Region) -> Tensor:
        def read(i: int, x: Tensor, real: Tensor | None) -> Tensor:
            return shown(self.norms[i](convolve(self.convs[i], x, real), real), real)

        def up(x: Tensor) -> Tensor:
            return resized(x, fine.shape[1:3], other[1], region[1], nearest=True)

        gate = up(torch.sigmoid(read(2, coarse, other[0])))
        return read(0, fine, region[0]) * gate + up(read(1, coarse, other[0]))


class _Modulation(nn.Module):
    """x + s_1 W(conv11(gelu(A LN x)) V LN x), then x + s_2 W_2(h + gelu(conv3(h))), h = gelu(W_1 LN x)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.a, self.v, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.spread = nn.Conv2d(dim, dim, 11, padding=5, groups=dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.near = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)
        self.scales = nn.ParameterList(torch.full((dim,), 1e-6) for _ in range(2))

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        h = self.norm(x)
        x = x + self.scales[0] * self.out(convolve(self.spread, F.gelu(self.a(h)), real) * self.v(h))
        h = F.gelu(self.up(self.norm_mlp(x)))
        return x + self.scales[1] * self.down(h + F.gelu(convolve(self.near, h, real)))


@register
class PMAA(Mechanism):
    """A map is read at several scales, their sum is worked over where it is smallest, and given back to each of them.

        o_0 = h + S_0(h), h = S(x);   o_i = S_i(o_{i-1}), of half the sides;   g = modulate(sum_i mean_pool(o_i))
        f_i = inject_1(o_i, g),   inject_k(l, g) = norm(conv_k l) up(sigmoid(norm(conv_k g))) + up(norm(conv_k g))
        e = inject_5(f_{D-2}, f_{D-3}),  then e = inject_5(f_i, e) for i = D-3 .. 0;   y = W e + b + x

    x: [b, height, width, dim]; o and all behind it have `hidden` features (4 dim by default); D: depth, at least 3.
    S: a convolution, norm, ReLU, linear layer and norm. conv_k is depthwise of k x k, up takes the nearest cell, and
    modulate is a block of its own: an 11x11 depthwise convolution times a value, and an MLP. Sides are halved rounding
    up. Norms: batch norm over real cells, but LayerNorm in modulate. The result is y, the residual included; without
    stochastic depth.

    Source: Zou et al., PMAA: A Progressive Multi-scale Attention Autoencoder Model, arXiv:2303.16565, and its released
    model/pmaa.py, which is followed: the decoder begins with f_{D-3}, not with the coarser f_{D-1} of the paper's
    figure, which is then read by nothing and not built here; S_i convolve densely (their group size is all features).
    Weights: proj_1x1, spp_dw, globalatt, loc_glo_fus and last_layer are the parts here in that order.
    """

    card = Card(
        name="pmaa",
        title="PMAA: A Progressive Multi-Scale Attention Autoencoder Model",
        reference="arXiv:2303.16565",
        family=Family.GRID,
        patterns={"grid"},
        time="n",
        state="",
        decodes=False,
        example={"hidden": 12, "depth": 3},
        notes="A whole block with its residual; heads are not used.",
    )

    def __init__(
        self, dim: int, heads: int = 1, *, causal: bool = False, hidden: int | None = None, depth: int = 5
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        hidden = hidden or 4 * dim
        if depth < 3 or hidden < 1:
            raise ValueError(f"pmaa: depth={depth}, hidden={hidden}; want a depth of 3 or more, and features")
        self.enter = _Separable(dim, hidden, 1, groups=dim, skip=dim == hidden)
        self.scales = nn.ModuleList(
            _Separable(hidden, hidden, 3, stride=1 + (i > 0), skip=i == 0) for i in range(depth)
        )
        self.modulate = _Modulation(hidden)
        self.give = nn.ModuleList(_Injection(hidden, 1) for _ in range(depth - 1))
        self.join = nn.ModuleList(_Injection(hidden, 5) for _ in range(depth - 1))
        self.out = nn.Linear(hidden, dim)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        x = shown(x, call.padding)
        outputs, regions = self._read(x, call.padding)
        small, last = outputs[-1].shape[1:3], regions[-1]
        pooled = [averaged(o, small, r[0], last[1]) for o, r in zip(outputs, regions, strict=True)]
        g = self.modulate(torch.stack(pooled).sum(0), last[0])
        given = [give(o, g, r, last) for give, o, r in zip(self.give, outputs, regions, strict=False)]
        top = len(given) - 1
        e, region = given[top - 1], regions[top - 1]
        for i in range(top, -1, -1):
            e, region = self.join[i](given[i], e, regions[i], region), regions[i]
        return Result(self.out(e) + x)

    def _read(self, x: Tensor, real: Tensor | None) -> tuple[list[Tensor], list[Region]]:
        """The map at every scale, and what is real of it."""
        region: Region = (real, None if real is None else extent(real))
        h = shown(self.enter(x, real, real), real)
        outputs: list[Tensor] = []
        regions: list[Region] = []
        for i, scale in enumerate(self.scales):
            before, reach = region
            if i and reach is not None:
                reach = (reach + 1) // 2
                region = (rectangle(reach, [(side + 1) // 2 for side in h.shape[1:3]]), reach)
            h = shown(scale(h, before, region[0]), region[0])
            outputs.append(h)
            regions.append(region)
        return outputs, regions
