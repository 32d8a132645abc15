"""Disassembled window attention with local structure, of ConDaFormer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, FeedForward, convolve, shown
from manyheads.functional.grid_extents import over_extents
from manyheads.functional.grid_windows import blocks, gathered, put_back, whole_weights, windows_of
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


class _Structure(nn.Module):
    """What stands around a cell: half of the features of the cell alone, half of the 27 cells around it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alone, self.norm_alone = nn.Linear(dim, dim // 2, bias=False), CellNorm(dim // 2)
        self.conv = nn.Conv3d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm_conv, self.around, self.norm_around = CellNorm(dim), nn.Linear(dim, dim // 2), CellNorm(dim // 2)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        around = F.gelu(self.norm_conv(convolve(self.conv, x, real), real))
        parts = self.norm_alone(self.alone(x), real), self.norm_around(self.around(around), real)
        return torch.cat(parts, -1)


@register
class ConDaFormer(Mechanism):
    """Three flat windows in place of a cube: a third of the heads attends in each plane, and convolutions tie them.

        z = S(LN x);  x = x + W_o S'(o(z));  y = x + MLP(LN x)
        S(z) = [BN(W z) ; BN(W' gelu(BN(conv3x3x3(z))) + b)], half of the features each, the convolution depthwise
        logit_ij = q_i . k_j + sum over axes (q_i . Q[offset] + k_j . K[offset]),  q scaled by 1 / sqrt(d)
        o_i = sum_j softmax_j(logit_ij) (v_j + sum over axes V[offset]),  offset = place of i less that of j

    Windows are (window, window, 1), (window, 1, window) and (1, window, window) cells, for the heads' first, second and
    last third; Q, K, V: [2 window steps - 1, 3 axes, heads / 3, d], the same for the three. shift: windows begin half a
    window earlier, as in every second block. x: [b, depth, height, width, dim], a voxel to a cell; mask says which of
    them hold points: empty ones are no keys, enter no statistics, and are zeros for the convolution. Windows are
    counted from the first occupied cell of each row of the batch (in the released code, of the whole batch). The
    mechanism is the whole block. Matrix: of the attention.

    Source: Duan et al., ConDaFormer: Disassembled Transformer with Local Structure Enhancement for 3D Point Cloud
    Understanding, arXiv:2312.11112. The paper has one depthwise convolution for S, the released code, followed here,
    the two branches. Its points keep their place within a voxel; here a cell has none, and steps, 1 / quant_size there,
    only says which rows of published tables its whole offsets read.
    Weights: conv_1, conv_3, conv_1_post, conv_3_post are before and after (alone, norm_alone, conv, norm_conv, around,
    norm_around); qkv is q_proj, k_proj, v_proj in this order, proj o_proj; q_table, k_table, v_table are query_table,
    key_table, value_table; mlp.fc1, .fc2 are mlp.up, .down.
    """

    card = Card(
        name="condaformer",
        title="ConDaFormer: Disassembled Transformer with Local Structure Enhancement for 3D Point Cloud Understanding",
        reference="arXiv:2312.11112",
        family=Family.GRID,
        patterns={"volume"},
        time="n window^2",
        state="",
        decodes=False,
        example={"dim": 12, "heads": 3, "window": 3},
        notes="A block of its own, with residuals, norms and MLP. Empty cells cost as much as occupied ones: cut "
        "points that fill little of their box into parts.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        window: int = 4,
        shift: bool = False,
        steps: int = 1,
        mlp_ratio: float = 4.0,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if heads % 3 or dim % 2 or window < 1 or steps < 1 or int(dim * mlp_ratio) < 1:
            raise ValueError(
                f"{self.card.name}: dim={dim}, heads={heads}, window={window}, steps={steps}, mlp_ratio={mlp_ratio}; "
                "want an even dim, heads divisible by 3 (a third for each plane), and the others at least 1"
            )
        self.window, self.shift, self.steps = window, shift, steps
        shape = (2 * window * steps - 1, 3, heads // 3, self.head_dim)
        self.query_table, self.key_table, self.value_table = (
            nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02)) for _ in range(3)
        )
        self.before, self.after = _Structure(dim), _Structure(dim)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.o_proj, self.mlp = nn.Linear(dim, dim), FeedForward(dim, int(dim * mlp_ratio))
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real = call.padding
        z = self.before(shown(self.norm_attention(shown(x, real)), real), real)
        o, weights = over_extents(z, real, lambda part, seen: self._planes(part, seen, call.need_weights))
        x = x + self.o_proj(self.after(shown(o, real), real))
        return Result(x + self.mlp(self.norm_mlp(x)), weights)

    def _planes(self, z: Tensor, real: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        cells = z.flatten(1, 3)
        q, k, v = (
            layer(cells).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, 1)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed, weights = [], []
        for flat in range(3):
            axis = 2 - flat
            window = [1 if i == axis else self.window for i in range(3)]
            one, matrix = self._plane(q[flat], k[flat], v[flat], window, z.shape[1:4], real, need_weights)
            mixed.append(one)
            weights.append(matrix)
        output = torch.cat(mixed, 1).transpose(1, 2).flatten(2).view_as(z)
        return output, torch.cat(weights, 1) if need_weights else None  # type: ignore[arg-type]

    def _plane(
        self, q: Tensor, k: Tensor, v: Tensor, window: list[int], sizes: Any, real: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """q, k, v [b, h, n, d] of the heads of one plane."""
        pairs = zip(sizes, window, strict=True)
        layout = [blocks(size, w, shift=w // 2 if self.shift else 0) for size, w in pairs]
        windows, n = windows_of(layout, sizes, device=q.device), q.shape[2]
        queries = gathered(q, windows.queries) * self.head_dim**-0.5
        keys, values = gathered(k, windows.keys), gathered(v, windows.keys)
        of_query, of_key, of_value = (
            self._offsets(table.to(q.dtype), window) for table in (self.query_table, self.key_table, self.value_table)
        )
        scores = queries @ keys.mT
        scores = scores + torch.einsum("bhwsd,sthd->bhwst", queries, of_query)
        scores = scores + torch.einsum("bhwtd,sthd->bhwst", keys, of_key)
        allowed = (windows.keys >= 0)[:, None]
        if real is not None:
            there = gathered(real.flatten(1)[..., None], windows.keys)[..., 0]
            allowed = allowed & there[:, None, :, None]
        weights = masked_softmax(scores, allowed)
        mixed = weights @ values + torch.einsum("bhwst,sthd->bhwsd", weights, of_value)
        whole = whole_weights(weights, windows, n, n) if need_weights else None
        return put_back(mixed, windows, n), whole

    def _offsets(self, table: Tensor, window: list[int]) -> Tensor:
        """What the table holds for the offsets of each pair of cells, summed over the axes, [s, t, h, d]."""
        places = torch.cartesian_prod(*(torch.arange(size, device=table.device) for size in window))
        lag = (places[:, None] - places[None, :]) * self.steps + self.window * self.steps - 1
        return table[lag[..., 0], 0] + table[lag[..., 1], 1] + table[lag[..., 2], 2]
