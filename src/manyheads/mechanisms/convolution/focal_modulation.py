"""Focal modulation, the mixer of FocalNets."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import cell_mean, convolve, shown
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class FocalModulation(Mechanism):
    """Contexts of growing reach, gated and summed, modulate each cell's query: aggregation first, interaction last.

        [q, z_0, g] = W x;   z_l = GELU(DWConv_(k_l) z_(l-1)),  k_l = window + factor (l - 1),  l = 1 .. levels
        m = sum_l g_l z_l + g_(levels+1) GELU(mean z_levels);   y = W_o (q * W_h m)

    g: one gate per level and cell, without an activation, shared by all channels. x: [b, height, width, dim], of any
    size. normalise: m / (levels + 1). post_norm: a LayerNorm between the product and W_o. heads has no meaning here and
    changes nothing. There are no weights from cell to cell.

    Source: Yang et al., Focal Modulation Networks, arXiv:2203.11926, and the released FocalModulation, where kernels
    grow with the level, as here; the level of the mean, which the paper calls L + 1, has the last gate. Padded cells
    read as zeros at every level and are not in the mean. The block around it is the usual one.
    Weights: f, proj as they are; h without its last two axes; focal_layers.l.0 is convs.l.
    """

    card = Card(
        name="focal-modulation",
        title="Focal Modulation Networks",
        reference="arXiv:2203.11926",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height width",
        state="",
        decodes=False,
        example={"levels": 2},
        notes="for images: no causal form, as the mean is over the whole map",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        levels: int = 2,
        window: int = 3,
        factor: int = 2,
        normalise: bool = False,
        post_norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if levels < 1 or window < 1 or window % 2 == 0 or factor < 0 or factor % 2:
            raise ValueError(
                f"focal-modulation: levels={levels}, window={window}, factor={factor}; want at least one level, an odd "
                "window and an even factor, so that every kernel has a middle"
            )
        self.levels = levels
        self.share = 1 / (levels + 1) if normalise else 1.0
        self.f = nn.Linear(dim, 2 * dim + levels + 1, bias=bias)
        sizes = [window + factor * level for level in range(levels)]
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=False) for size in sizes
        )
        self.h, self.proj = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if post_norm else None

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real = call.padding
        q, level, gates = self.f(shown(x, real)).split([self.dim, self.dim, self.levels + 1], -1)
        summed = 0.0
        for i, conv in enumerate(self.convs):
            level = F.gelu(convolve(conv, level, real))
            summed = summed + level * gates[..., i : i + 1]
        summed = summed + F.gelu(cell_mean(level, real)) * gates[..., -1:]
        modulated = q * self.h(summed * self.share)
        return Result(self.proj(modulated if self.norm is None else self.norm(modulated)))
