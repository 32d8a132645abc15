"""The mixed state-space block of VFIMamba: frames scanned together, cell by cell."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import cell_mean, convolve, shown
from manyheads.functional.grid_scans import GridScan, crossing_paths
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


class _FrameScan(nn.Module):
    """[u, z] = W x;   y = W_o (LN(scans(SiLU(DWConv u))) * SiLU(z)) over frames [b, f, h, w, e] interleaved by cell."""

    def __init__(self, dim: int, inner: int, state: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.scan = GridScan(inner, state, math.ceil(dim / 16))
        self.out_norm, self.out_proj = nn.LayerNorm(inner), nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        frames, height, width = x.shape[1:4]
        u, z = self.in_proj(x).chunk(2, -1)
        flat = None if real is None else real.flatten(0, 1)
        u = F.silu(convolve(self.conv2d, u.flatten(0, 1), flat)).view(u.shape)
        interleaved = u.permute(0, 2, 3, 1, 4)
        there = None if real is None else real.permute(0, 2, 3, 1).flatten(1)
        paths = crossing_paths(height, width, frames, x.device)
        scanned = self.scan(interleaved.flatten(1, 3), paths, there).to(u.dtype)
        back = self.out_norm(scanned).view(interleaved.shape).permute(0, 3, 1, 2, 4)
        output: Tensor = self.out_proj(back * F.silu(z))
        return output


class _ChannelAttention(nn.Module):
    """Two 3 x 3 convolutions with a GELU between, times a gate per frame and channel made of their mean."""

    def __init__(self, dim: int, narrow: int, squeezed: int) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(dim, narrow, 3, padding=1), nn.Conv2d(narrow, dim, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(dim, squeezed), nn.Linear(squeezed, dim)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """x [b, h, w, e]"""
        found = convolve(self.conv_out, F.gelu(convolve(self.conv_in, x, real)), real)
        gate: Tensor = self.excite(F.relu(self.squeeze(cell_mean(found, real))))
        return found * gate.sigmoid()


@register
class VFIMamba(Mechanism):
    """Frames of a clip are scanned as one sequence in which the same cell of all frames stands together.

        x <- s_1 x + SS2D(LN x);   y = s_2 x + CAB(LN x),   s: a factor per channel

    SS2D: [u, z] = W x, u = SiLU(DWConv u) per frame; cells are ordered (row, column, frame) and scanned by rows, by
    columns and both backwards: h <- exp(dt A) h + dt B u, y = C h + D u, each way with its own parameters; summed, a
    LayerNorm, times SiLU(z), W_o. CAB, per frame: conv(GELU(conv x)), narrower by compress, times
    sigmoid(W_2 relu(W_1 mean)), narrower by squeeze. x: [b, frames, height, width, dim]; two frames in the paper, any
    number here. The mechanism is the block. heads has no meaning here and changes nothing; there are no weights.

    Source: Zhang et al., VFIMamba: Video Frame Interpolation with State Space Models, arXiv:2407.02315, and the
    released VSSBlock, whose frames lie on the batch axis one after the other. It puts the columns' results back in a
    wrong order (read as [.., width, height] where two frames lie innermost); here every cell gets its own.
    Weights: self_attention is ss2d, its x_proj_weight, dt_projs, A_logs and Ds scan's, one way after the other, of
    which the released order is rows, columns and both backwards.
    """

    card = Card(
        name="vfimamba",
        title="VFIMamba: Video Frame Interpolation with State Space Models",
        reference="arXiv:2407.02315",
        family=Family.RECURRENT,
        patterns={"volume"},
        time="frames height width",
        state="",
        decodes=False,
        example={"state": 2, "compress": 2, "squeeze": 4},
        notes="a block of its own, for frames: no MLP goes behind it",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        state: int = 16,
        expansion: int = 2,
        compress: int = 3,
        squeeze: int = 30,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if min(state, expansion, compress, squeeze) < 1 or dim < compress:
            raise ValueError(
                f"vfimamba: state={state}, expansion={expansion}, compress={compress}, squeeze={squeeze}; want at "
                f"least 1 of each, and compress at most dim={dim}"
            )
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ss2d = _FrameScan(dim, expansion * dim, state)
        self.cab = _ChannelAttention(dim, dim // compress, max(1, dim // squeeze))
        self.skip_1, self.skip_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real = call.padding
        x = shown(x, real)
        x = x * self.skip_1 + self.ss2d(self.norm_1(x), real)
        flat = None if real is None else real.flatten(0, 1)
        found = self.cab(self.norm_2(x).flatten(0, 1), flat).view(x.shape)
        return Result(x * self.skip_2 + found)
