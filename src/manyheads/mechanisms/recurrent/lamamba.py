"""The block of LaMamba: a scan of the whole map, attention in windows, and an MLP, all under a condition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import convolve, shown
from manyheads.functional.grid_bias import offset_index
from manyheads.functional.grid_scans import GridScan, snake_paths
from manyheads.functional.grid_windows import attend_cells, blocks, windows_of
from manyheads.functional.multihead import Heads
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


class _SnakeScan(nn.Module):
    """[u, z] = W x;   y = W_o (LN(scans(SiLU(DWConv u))) * SiLU(z)), the four scans along paths that never jump."""

    def __init__(self, dim: int, inner: int, state: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.scan = GridScan(inner, state, math.ceil(dim / 16))
        self.out_norm, self.out_proj = nn.LayerNorm(inner), nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(convolve(self.conv2d, u, real))
        there = torch.ones_like(x[:1, ..., 0], dtype=torch.bool) if real is None else real
        scanned = self.scan(u.flatten(1, 2), snake_paths(there), None if real is None else real.flatten(1))
        output: Tensor = self.out_proj(self.out_norm(scanned.to(u.dtype)).view(u.shape) * F.silu(z))
        return output


@register
class LaMamba(Mechanism):
    """Each block reads the whole map by state-space scans, then attends within windows, then has an MLP.

        x <- x + g_1 SS2D(m_1(x));   x <- x + g_2 WMSA(m_2(x));   x <- x + g_3 MLP(m_3(x))
        m_i(x) = LN(x) (1 + scale_i) + shift_i,   [shift, scale, g]_1..3 = W SiLU(t)

    SS2D: [u, z] = W x, u = SiLU(DWConv u), four selective scans h <- exp(dt A) h + dt B u, y = C h + D u along snakes
    of rows and columns, summed, a LayerNorm, times SiLU(z), W_o. WMSA: softmax attention within windows, whose corners
    are moved by shift (half a window in every other block), with a table of biases by relative place. t: `condition`
    [b, condition_dim], of a time step and a label in the paper; without it zeros, so that shifts, scales and gates are
    those of W's bias. W starts at zero, and so the block at x. The mechanism is the block. It gives no weights.

    Source: Fu et al., LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba,
    arXiv:2408.02615, and the released LaMambaBlock_conditioned, which scans before it attends, has affine LayerNorms
    and takes square maps of even sides, on which the snakes are its; here they start at the corners of what is real.
    Maps as small as a window are attended to as a whole there, unshifted; here shift does what it says.
    Weights: op.x_proj_weight, op.dt_projs, op.A_logs and op.Ds are scan.scan's, one path after the other; attn.qkv is
    q, k, v in this order; condition_projection is absent where condition_dim is dim.
    """

    card = Card(
        name="lamamba",
        title="LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba",
        reference="arXiv:2408.02615",
        family=Family.RECURRENT,
        patterns={"grid"},
        time="height width window^2",
        state="",
        decodes=False,
        example={"window": 3, "shift": 1, "state": 2, "condition_dim": 6},
        takes={"condition": "optional: [batch, condition_dim], what the block is conditioned on"},
        notes="a block of its own: no MLP goes behind it; with its gates at zero it begins as the identity",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        window: int = 8,
        shift: int = 0,
        state: int = 1,
        expansion: int = 2,
        mlp_ratio: float = 4.0,
        condition_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim, hidden = self._split_heads(), int(mlp_ratio * dim)
        if window < 1 or not 0 <= shift < window or min(state, expansion, hidden, condition_dim or 1) < 1:
            raise ValueError(
                f"lamamba: window={window}, shift={shift}, state={state}, expansion={expansion}, "
                f"mlp_ratio={mlp_ratio}, condition_dim={condition_dim}; want shift < window and 1 or more of the rest"
            )
        self.window, self.shift, self.condition_dim = window, shift, condition_dim or dim
        same = self.condition_dim == dim
        self.condition_projection = nn.Identity() if same else nn.Linear(self.condition_dim, dim)
        self.modulation = nn.Linear(dim, 9 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.norm, self.norm_swin, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.scan = _SnakeScan(dim, expansion * dim, state)
        self.attn = Heads(dim, heads, bias)
        self.places = nn.Embedding((2 * window - 1) ** 2, heads)
        nn.init.trunc_normal_(self.places.weight, std=0.02)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"condition": torch.linspace(-1, 1, self.condition_dim, dtype=torch.float64)[None]}

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real, condition = call.padding, call.inputs.get("condition")
        if condition is None:
            condition = x.new_zeros(1, self.condition_dim)
        if condition.ndim != 2 or condition.shape[0] not in (1, len(x)) or condition.shape[1] != self.condition_dim:
            raise ValueError(
                f"lamamba: condition has shape {tuple(condition.shape)}; want [{len(x)}, {self.condition_dim}]"
            )
        made = self.modulation(F.silu(self.condition_projection(condition.to(x.dtype))))[:, None, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2, shift_3, scale_3, gate_3 = made.chunk(9, -1)
        x = shown(x, real)
        x = x + gate_1 * self.scan(self.norm(x) * (1 + scale_1) + shift_1, real)
        x = x + gate_2 * self._attend_windows(self.norm_swin(x) * (1 + scale_2) + shift_2, real)
        wide = self.norm2(x) * (1 + scale_3) + shift_3
        return Result(x + gate_3 * self.fc2(F.gelu(self.fc1(wide))))

    def _attend_windows(self, x: Tensor, real: Tensor | None) -> Tensor:
        sizes, window = x.shape[1:3], self.window
        # The windows' corners are moved down and to the right; what is cut off at the rim is a window of its own.
        windows = windows_of(
            [blocks(size, window, shift=-self.shift % window) for size in sizes], sizes, device=x.device
        )
        places = self.places(offset_index((window, window), x.device)).permute(2, 0, 1)
        return attend_cells(self.attn, shown(x, real), windows, real, False, places)[0]
