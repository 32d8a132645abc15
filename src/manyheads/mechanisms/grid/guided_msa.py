"""Multi-scale self-guided attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, convolve, shown
from manyheads.functional.dual_attention import narrow_width, over_features, over_positions
from manyheads.functional.feature_maps import extent, rectangle, resized
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

Region = tuple[Tensor | None, Tensor | None]  # what is real of a map, and its extent


class _Layer(nn.Module):
    """conv - norm - activation, the activation over cells."""

    def __init__(self, wide: int, dim: int, kernel: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(wide, dim, kernel, padding=kernel // 2)
        self.norm, self.activation = CellNorm(dim), activation

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        activated: Tensor = self.activation(self.norm(convolve(self.conv, x, real), real))
        return activated


def _halved(x: Tensor, region: Region) -> tuple[Tensor, Region]:
    """The largest of two by two cells (of what a ReLU gave, so that zeros change nothing); a rest of one is left out,
    but for a side of one."""
    real, reach = region
    x = F.pad(shown(x, real), (0, 0, 0, max(2 - x.shape[2], 0), 0, max(2 - x.shape[1], 0)))
    halved = F.max_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)
    if reach is None:
        return halved, (None, None)
    reach = (reach // 2).clamp(min=1)
    return halved, (rectangle(reach, halved.shape[1:3]), reach)


class _Semantic(nn.Module):
    """An encoder and decoder with two levels: what it makes in the middle, with its region, and what comes out."""

    def __init__(self, dim: int) -> None:
        super().__init__()

        def two(wide: int, out: int) -> nn.ModuleList:
            return nn.ModuleList([_Layer(wide, out, 3, nn.ReLU()), _Layer(out, out, 3, nn.ReLU())])

        self.down1, self.down2 = two(dim, 2 * dim), two(2 * dim, 4 * dim)
        self.up2, self.up1 = two(4 * dim, 2 * dim), two(2 * dim, dim)
        self.wider2, self.wider1 = (nn.ConvTranspose2d(d, d, 2, stride=2) for d in (2 * dim, dim))

    def forward(self, u: Tensor, region: Region) -> tuple[Tensor, Region, Tensor]:
        h, first = self._down(self.down1, u, region)
        size = h.shape[1:3]
        middle, second = self._down(self.down2, h, first)
        h = self._up(self.up2, self.wider2, middle, second, size, first)
        return middle, second, self._up(self.up1, self.wider1, h, first, u.shape[1:3], region)

    def _down(self, layers: nn.ModuleList, x: Tensor, region: Region) -> tuple[Tensor, Region]:
        for layer in layers:
            x = layer(x, region[0])
        return _halved(x, region)

    def _up(self, layers: Any, wider: nn.Module, x: Tensor, region: Region, size: Any, into: Region) -> Tensor:
        for layer in layers:
            x = layer(x, region[0])
        reach = None if region[1] is None else 2 * region[1]
        return resized(convolve(wider, x, region[0]), size, reach, into[1])


class _Dual(nn.Module):
    """Attention over positions and over features, each between two convolutions, summed."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, narrow = heads, narrow_width(dim, heads)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, d) for d in (narrow, narrow, dim))
        self.gammas = nn.ParameterList(torch.zeros(()) for _ in range(2))
        self.before, self.behind = (
            nn.ModuleList(_Layer(wide, dim, 3, nn.PReLU()) for _ in range(2)) for wide in (2 * dim, dim)
        )

    def forward(self, u: Tensor, real: Tensor | None) -> Tensor:
        p, c = (shown(layer(u, real), real) for layer in self.before)
        attended, _ = over_positions(self.q_proj(p), self.k_proj(p), self.v_proj(p), real, self.heads, False)
        p = self.gammas[0] * attended + p
        c = self.gammas[1] * over_features(c, unlike=True) + c
        summed: Tensor = self.behind[0](p, real) + self.behind[1](c, real)
        return summed


class _Step(nn.Module):
    """One of the two steps: a map per scale of what the scale and the fused map show together."""

    def __init__(self, dim: int, scales: int, heads: int) -> None:
        super().__init__()
        self.semantic = _Semantic(2 * dim)
        self.dual = nn.ModuleList(_Dual(dim, heads) for _ in range(scales))
        self.guide = nn.ModuleList(nn.Conv2d(2 * dim, dim, 3, padding=1) for _ in range(scales))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(scales))

    def forward(self, joined: list[Tensor], region: Region) -> tuple[list[Tensor], list[Tensor], list[Tensor], Region]:
        outputs, codes, again, middle = [], [], [], region
        for u, dual, guide, out in zip(joined, self.dual, self.guide, self.out, strict=True):
            code, middle, decoded = self.semantic(u, region)
            outputs.append(out(dual(u, region[0]) * convolve(guide, decoded, region[0])))
            codes.append(code)
            again.append(decoded)
        return outputs, codes, again, middle


def _distance(one: Tensor, other: Tensor, real: Tensor | None) -> Tensor:
    square = (one - other).float() if one.dtype.itemsize < 4 else one - other
    square = square.square()
    if real is None:
        return square.mean()
    return shown(square, real).sum() / (real.sum().clamp(min=1) * square.shape[-1])


@register
class GuidedMSA(Mechanism):
    """Maps of several scales are attended to together, and twice, the second time guided by the first.

        F_s = resize(prelu(norm(W_s x_s)), size of the first),   M = three convolutions of [F_S ; .. ; F_1]
        u_s = [F_s ; M],        A_s = W((P(u_s) + C(u_s)) conv3x3(D(u_s)))
        u'_s = [F_s ; A_s M],   y_s = the same with layers of its own

    P = f(gamma_p softmax(q k^T) v + p), every cell to every cell, q and k of dim / 8 features and no scale; C =
    f(gamma_c c softmax(-c^T c)^T + c), every feature to the features least like it; p, c = f(u), f a convolution, norm
    and PReLU; gammas begin at 0. D: an encoder with two levels and its decoder, one for all scales of a step. Losses:
    "semantic", the mean square of the distance of both steps' codes, and "reconstruction", of u and D(u) in both steps,
    each summed over scales.

    Maps: x_s [b, h_s, w_s, widths[s]], the finest first; y a tuple of maps [b, h_1, w_1, dim], one per scale; the paper
    predicts from each (a 1x1 convolution) and averages, in training from every F_s too. heads: of P, 1 in the
    paper. Norms: batch norm, over real cells.

    Source: Sinha, Dolz, Multi-Scale Self-Guided Attention for Medical Image Segmentation, arXiv:1906.02849, and its
    released attention.py and my_stacked_danet.py, which wants sides that 4 divides and layers guided losses outside;
    here an odd rest is left out of D's halves and interpolated back.
    Weights: down1 to down4 are reduce, fuse1 fuse; of each step semanticModule is semantic, pam_ and cam_attention the
    two layers before and behind (their 1x1 convolutions q, k, v_proj), conv_sem guide and conv8 out.
    """

    card = Card(
        name="guided-msa",
        title="Multi-Scale Self-Guided Attention for Medical Image Segmentation",
        reference="arXiv:1906.02849",
        family=Family.GRID,
        patterns={"maps"},
        time="n^2",
        state="",
        decodes=False,
        example={"dim": 4, "heads": 1, "widths": [6]},
        notes="Gives as many maps as it is given, all of the first one's size.",
    )

    def __init__(self, dim: int, heads: int = 1, *, causal: bool = False, widths: Sequence[int] | None = None) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.map_dims = tuple([dim] * 4 if widths is None else widths)
        if not self.map_dims or min(self.map_dims) < 1:
            raise ValueError(f"guided-msa: widths={widths}; want the features of each map, one or more")
        scales = len(self.map_dims)
        self.reduce = nn.ModuleList(_Layer(wide, dim, 1, nn.PReLU()) for wide in self.map_dims)
        self.fuse = nn.ModuleList(
            _Layer(wide, dim, kernel, nn.PReLU()) for wide, kernel in ((scales * dim, 3), (dim, 3), (dim, 1))
        )
        self.first, self.second = (_Step(dim, scales, heads) for _ in range(2))
        self.result_dim = dim

    def result_size(self, *size: Any) -> Any:
        return (size[0],) * len(size)

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        masks = (None,) * len(x) if call.padding is None else call.padding
        reaches = [None if real is None else extent(real) for real in masks]
        real, region = masks[0], (masks[0], reaches[0])
        scales = []
        for one, mask, reach, reduce in zip(x, masks, reaches, self.reduce, strict=True):
            scales.append(shown(resized(shown(reduce(one, mask), mask), x[0].shape[1:3], reach, reaches[0]), real))
        fused = torch.cat(scales[::-1], -1)
        for layer in self.fuse:
            fused = layer(fused, real)
        u = [torch.cat([one, fused], -1) for one in scales]
        guides, codes, again, _ = self.first(u, region)
        u2 = [torch.cat([one, guide * fused], -1) for one, guide in zip(scales, guides, strict=True)]
        outputs, codes2, again2, middle = self.second(u2, region)
        rebuilt = [*zip(u, again, strict=True), *zip(u2, again2, strict=True)]
        far = [_distance(one, other, middle[0]) for one, other in zip(codes, codes2, strict=True)]
        lost = [_distance(one, other, real) for one, other in rebuilt]
        losses = {"semantic": torch.stack(far).sum(), "reconstruction": torch.stack(lost).sum()}
        return Result(tuple(outputs), losses=losses)
