"""Additive attention gates on the skips of a U-Net."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, convolve, shown
from manyheads.functional.feature_maps import CONVOLUTIONS, extent, resized
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class AttentionGate(Mechanism):
    """A skip is let through where the coarser map, which has seen more, asks for it.

        t = theta * x  (kernel = step = `step`, no bias),  p = resize(W_g g + b_g, size of t)
        a = sigmoid(W_psi relu(t + p) + b_psi),  one number per cell
        y = norm(W_y (resize(a, size of x) x) + b_y)

    Maps: the skip x [b, height, width, dim] and the gating map g [b, h, w, gate_dim] of any size; y is of the size of
    x. axes=3: with a depth in front of the height. inner: features of t. Both resizes are linear, corners not aligned.
    step: a side that it does not divide loses its rest in t, as in the released code (a shorter one is filled up with
    zeros). Padded cells are outside: the maps are resized as if they ended with what is real. Norm: batch norm, over
    real cells.

    Source: Oktay et al., Attention U-Net, arXiv:1804.03999, and its released GridAttentionBlock; many others' gates
    have a step of 1 and no W_y. Used on the skips of a residual U-Net for wounds (Reza et al. 2021, whose other
    layers are not public) and in AGUNet for volumes (arXiv:2101.07715).
    Weights: theta is theta; phi, psi and W.0 are gate, score and out without their axes of length 1; W.1 is norm.
    """

    card = Card(
        name="attention-gate",
        title="Attention U-Net: Learning Where to Look for the Pancreas",
        reference="arXiv:1804.03999",
        family=Family.GRID,
        patterns={"maps"},
        time="n",
        state="",
        decodes=False,
        example={"gate_dim": 24},
        notes="Gates one map by another; heads are not used.",
    )

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        causal: bool = False,
        gate_dim: int | None = None,
        inner: int | None = None,
        step: int = 2,
        axes: int = 2,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        gate_dim, inner = gate_dim or dim, inner or max(dim // 2, 1)
        if step < 1 or axes not in CONVOLUTIONS or min(gate_dim, inner) < 1:
            raise ValueError(
                f"attention-gate: step={step}, axes={axes}, gate_dim={gate_dim}, inner={inner}; want step, gate_dim "
                "and inner of at least 1, and 2 or 3 axes"
            )
        self.step, self.map_dims, self.map_axes = step, (dim, gate_dim), axes
        self.theta = CONVOLUTIONS[axes](dim, inner, step, stride=step, bias=False)
        self.gate, self.score, self.out = nn.Linear(gate_dim, inner), nn.Linear(inner, 1), nn.Linear(dim, dim)
        self.norm = CellNorm(dim)

    def result_size(self, *size: Any) -> Any:
        return size[0]

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        skip, coarse = x
        real = reach = reach_coarse = reach_inner = None
        if call.padding is not None:
            real, real_coarse = call.padding
            reach, reach_coarse = extent(real), extent(real_coarse)
            reach_inner = (reach // self.step).clamp(min=1)
        short = [max(self.step - side, 0) for side in reversed(skip.shape[1:-1])]
        filled = F.pad(skip, (0, 0, *(part for more in short for part in (0, more)))) if any(short) else skip
        t = convolve(self.theta, filled)
        p = resized(self.gate(coarse), t.shape[1:-1], reach_coarse, reach_inner)
        a = torch.sigmoid(self.score(F.relu(t + p)))
        a = resized(a, skip.shape[1:-1], reach_inner, reach)
        gated: Tensor = self.norm(self.out(a * shown(skip, real)), real)
        return Result(gated)
