"""Bidirectional RWKV: the spatial mix of Vision-RWKV, as RWKV-SAM uses it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import shown
from manyheads.functional.grid_scans import affine_scan
from manyheads.functional.linear import widen
from manyheads.functional.precision import own_dtype
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class VisionRWKV(Mechanism):
    """Cells are weighed by their keys and by how far off they lie along the rows, in both directions, per channel.

        y_t = (sum_(i != t) e^(k_i - (|t - i| - 1) w) v_i + e^(u + k_t) v_t) / (the same without v)
        k, v, r = W_(k,v,r) (mu_(k,v,r) x + (1 - mu_(k,v,r)) shift(x));   out = W_o (sigmoid(r) y)

    w = decay / n, u = first / n for n real cells, numbered row by row: a distance is one of the raster. decay of either
    sign. shift: the first quarter of the channels comes from the left neighbour, the next from the right, from above
    and from below, zeros from outside. Linear in n, as two scans; sums are kept relative to their largest term, so that
    no key is too large. heads has no meaning here and changes nothing. Weights differ from channel to channel: none.

    Source: Yuan et al., Mamba or RWKV: Exploring High-Quality and High-Efficiency Segment Anything Model (RWKV-SAM),
    arXiv:2406.19369, with the released VRWKV_SpatialMix. Its kernel adds 1e-6 to the divisor, which is left out here:
    every divisor has a term of its own cell. layer, depth: the place that the initial values hang on, as released (mu,
    decay and first differ by layer). The block around it has a channel mix and norms.
    Weights: key, value, receptance, output, spatial_decay and spatial_first have the released names, and spatial_mix_k,
    spatial_mix_v and spatial_mix_r but for their first two axes.
    """

    card = Card(
        name="vision-rwkv",
        title="Mamba or RWKV: Exploring High-Quality and High-Efficiency Segment Anything Model",
        reference="arXiv:2406.19369",
        family=Family.RECURRENT,
        patterns={"grid"},
        time="height width",
        state="",
        decodes=False,
        notes="for images; a cell's distance to another is counted along the rows",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, layer: int = 0, depth: int = 12, key_norm: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if not 0 <= layer < depth:
            raise ValueError(f"vision-rwkv: layer={layer}, depth={depth}; want 0 <= layer < depth")
        self.key, self.value, self.receptance, self.output = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.key_norm = nn.LayerNorm(dim) if key_norm else None
        deep, left = layer / max(depth - 1, 1), 1 - layer / depth
        share = torch.arange(dim) / dim
        self.spatial_decay = nn.Parameter(-5 + 8 * (torch.arange(dim) / max(dim - 1, 1)) ** (0.7 + 1.3 * deep))
        self.spatial_first = nn.Parameter(0.5 * ((torch.arange(dim) + 1) % 3 - 1) + torch.tensor(0.3).log())
        self.spatial_mix_k = nn.Parameter(share**left)
        self.spatial_mix_v = nn.Parameter(share**left + 0.3 * deep)
        self.spatial_mix_r = nn.Parameter(share ** (0.5 * left))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real = call.padding
        x = shown(x, real)
        moved = _neighbours(x)
        k, v, r = (
            layer(x * mu + moved * (1 - mu))
            for layer, mu in (
                (self.key, self.spatial_mix_k),
                (self.value, self.spatial_mix_v),
                (self.receptance, self.spatial_mix_r),
            )
        )
        there = torch.ones_like(x[:1, ..., 0], dtype=torch.bool) if real is None else real
        with own_dtype(x):
            y = weigh_both_ways(
                widen(k).flatten(1, 2), widen(v).flatten(1, 2), self.spatial_decay, self.spatial_first, there.flatten(1)
            )
        y = y.to(x.dtype).view(x.shape)
        return Result(self.output(r.sigmoid() * (y if self.key_norm is None else self.key_norm(y))))


def _neighbours(x: Tensor) -> Tensor:
    """Quarters of the channels from the left, from the right, from above and from below."""
    quarter = [x.shape[-1] * part // 4 for part in range(5)]
    left, right, above, below = (x[..., start:end] for start, end in pairwise(quarter))
    return torch.cat(
        [
            F.pad(left[:, :, :-1], (0, 0, 1, 0)),
            F.pad(right[:, :, 1:], (0, 0, 0, 1)),
            F.pad(above[:, :-1], (0, 0, 0, 0, 1, 0)),
            F.pad(below[:, 1:], (0, 0, 0, 0, 0, 1)),
        ],
        -1,
    )


def weigh_both_ways(k: Tensor, v: Tensor, decay: Tensor, first: Tensor, real: Tensor) -> Tensor:
    """k, v [b, n, e], decay and first [e], real [b or 1, n] -> y [b, n, e], the equation of the class."""
    count = real.sum(1)[:, None, None].clamp(min=1).to(k.dtype)
    w, u = decay.to(k.dtype) / count, first.to(k.dtype) / count
    place = (real.cumsum(1) - 1).clamp(min=0)[..., None].to(k.dtype)
    k = k.masked_fill(~real[..., None], -torch.inf)
    last = place.amax(1, keepdim=True)
    parts = [
        _before(k, v, place, w),
        tuple(t.flip(1) for t in _before(k.flip(1), v.flip(1), (last - place).flip(1), w)),
        (k + u, v, torch.ones_like(v)),
    ]
    scale = torch.stack([part[0] for part in parts]).detach().amax(0)
    scale = scale.masked_fill(scale == -torch.inf, 0.0)
    weighed = divisor = torch.zeros_like(v)
    for size, values, ones in parts:
        weight = (size - scale).exp()
        weighed, divisor = weighed + weight * values, divisor + weight * ones
    return weighed / torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def _before(k: Tensor, v: Tensor, place: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the tokens before each one: (s, a, b) with a e^s = sum_(i < t) e^(k_i - (t - i - 1) w) v_i, and b
    likewise without v. s is -inf where there are none."""
    size = k + place * w
    high = size.detach().cummax(1).values
    low = torch.finfo(k.dtype).min
    known = high.clamp(min=low)
    fading = torch.cat([torch.zeros_like(known[:, :1]), (known[:, :-1] - known[:, 1:]).exp()], 1)
    weight = (size - known).exp()
    sums = affine_scan(fading.repeat(1, 1, 2), torch.cat([weight * v, weight], -1))
    values, ones = F.pad(sums[:, :-1], (0, 0, 1, 0)).chunk(2, -1)
    before = F.pad(high[:, :-1], (0, 0, 1, 0), value=-torch.inf)
    return before - (place - 1) * w, values, ones
