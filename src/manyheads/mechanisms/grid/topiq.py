"""Cross-scale attention, of TOPIQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import convolve
from manyheads.functional.feature_maps import averaged, extent, rectangle
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

_SIDE = 32  # cells of the table of positions along each axis


def cubic_weights(old: int, new: Tensor, wide: int) -> Tensor:
    """[b, wide, old]: cubic interpolation of a line of `old` cells at the centres of `new` ones [b], as torch's."""
    place = (torch.arange(wide, device=new.device) + 0.5) * (old / new.double())[:, None] - 0.5
    first, weights = place.floor(), torch.zeros(*place.shape, old, dtype=place.dtype, device=new.device)
    for step in (-1, 0, 1, 2):
        away = (place - first - step).abs()
        near, far = (1.25 * away - 2.25) * away**2 + 1, ((-0.75 * away + 3.75) * away - 6.0) * away + 3.0
        cell = (first + step).clamp(0, old - 1)[..., None] == torch.arange(old, device=new.device)
        weights = weights + cell * torch.where(away <= 1, near, far)[..., None]
    return weights


class _Gate(nn.Module):
    """sigmoid(conv3(gelu(conv3(gelu(W x))))), one number per cell."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.enter = nn.Linear(wide, narrow)
        self.middle, self.leave = (nn.Conv2d(narrow, d, 3, padding=1) for d in (narrow, 1))

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        h = F.gelu(convolve(self.middle, F.gelu(self.enter(x)), real))
        return torch.sigmoid(convolve(self.leave, h, real))


class _Block(nn.Module):
    """q + attention(LN q, m), then q + W_2 gelu(W_1 LN q); m = LN(memory), or LN q where there is none."""

    def __init__(self, dim: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_memory = nn.LayerNorm(dim) if cross else None
        self.attention, wide = Heads(dim, heads, True), min(4 * dim, 2048)
        self.up, self.down = nn.Linear(dim, wide), nn.Linear(wide, dim)

    def forward(self, q: Tensor, memory: Tensor, allowed: Tensor | None) -> Tensor:
        normed = self.norm(q)
        read = self.attention.read(normed if self.norm_memory is None else self.norm_memory(memory))
        q = q + self.attention(normed, *read, allowed, False)[0]
        return q + self.down(F.gelu(self.up(self.norm_mlp(q))))


@register
class TOPIQ(Mechanism):
    """What the coarsest scale has seen asks the finer ones, from top to bottom, how it is there.

        [f ; g] = W x_i,   h_i = mean_pool(gelu(f) gate(g), size of the last map)
        t_i = block(gelu(V h_i) + position),   q = t_last
        q = cross(q, t_i) for i = last - 1 .. first,   y = block(q)

    gate: sigmoid of three convolutions, one number per cell, of `gate` features between. block: pre-norm attention to
    itself and MLP, cross the same with keys and values of another map. position: [rows ; columns], 32 learnt vectors of
    dim / 2 each, interpolated (cubic) to the size of the map.

    Maps: x_i [b, h_i, w_i, widths[i]], the finest first; y [b, h, w, dim] of the last one's size (its mean and an MLP
    give the score). reference: then the same maps of the picture without distortion follow, and h_i =
    mean_pool([x ; r ; s] gate(s)), s = sqrt((x - r)^2 + 1e-12). Padded cells are in no mean and no key.

    Source: Chen et al., TOPIQ: A Top-down Approach from Semantics to Distortions for Image Quality Assessment,
    arXiv:2308.03060, and its released topiq_arch.py, where a map that is not larger in both sides is not pooled, and
    the cross layers hold a self-attention that nothing calls. Without dropout.
    Weights: splitconv is split; MultiheadAttention's in_proj is q, k, v in this order; h_emb and w_emb transposed.
    """

    card = Card(
        name="topiq",
        title="TOPIQ: A Top-down Approach from Semantics to Distortions for Image Quality Assessment",
        reference="arXiv:2308.03060",
        family=Family.GRID,
        patterns={"maps"},
        time="n + m^2",
        state="",
        decodes=False,
        example={"widths": [6, 8], "gate": 4},
        notes="n: cells of all maps; m: of the last one, whose size the result has.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        widths: Sequence[int] | None = None,
        gate: int = 64,
        reference: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        widths = [dim] * 4 if widths is None else list(widths)
        if not widths or min(widths) < 1 or gate < 1 or dim % 2:
            raise ValueError(
                f"topiq: widths={widths}, gate={gate}, dim={dim}; want the features of each map, a positive gate and "
                "an even dim"
            )
        self.levels, self.reference = len(widths), reference
        self.map_dims, self.result_dim = tuple(widths) * (2 if reference else 1), dim
        wide = [3 * w if reference else w for w in widths]
        self.gates = nn.ModuleList(_Gate(w, gate) for w in widths)
        self.split = nn.ModuleList(() if reference else (nn.Linear(w, 2 * w) for w in widths))
        self.reduce = nn.ModuleList(nn.Linear(w, dim) for w in wide)
        self.blocks = nn.ModuleList(_Block(dim, heads, False) for _ in widths)
        self.cross = nn.ModuleList(_Block(dim, heads, True) for _ in widths[1:])
        self.last = _Block(dim, heads, False)
        self.rows, self.columns = (nn.Parameter(0.02 * torch.randn(_SIDE, dim // 2)) for _ in range(2))

    def result_size(self, *size: Any) -> Any:
        return size[self.levels - 1]

    def map_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        sizes = super().map_sizes(height, width)[: self.levels]
        return sizes * 2 if self.reference else sizes

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        masks = (None,) * len(x) if call.padding is None else call.padding
        size, end = x[self.levels - 1].shape[1:3], masks[self.levels - 1]
        if self.reference and end is not None:
            end = end & masks[-1]
        reach = None if end is None else extent(end)
        allowed = None if reach is None else key_mask(rectangle(reach, size).flatten(1))
        position = self._position(size, reach, x[0])
        tokens = []
        for i in range(self.levels):
            real = masks[i]
            if self.reference and real is not None:
                real = real & masks[i + self.levels]
            pooled = averaged(self._weighed(i, x, real), size, real, reach)
            t = (F.gelu(self.reduce[i](pooled)) + position).flatten(1, 2)
            tokens.append(self.blocks[i](t, t, allowed))
        q = tokens[-1]
        for cross, memory in zip(self.cross, tokens[-2::-1], strict=True):
            q = cross(q, memory, allowed)
        return Result(self.last(q, q, allowed).unflatten(1, size))

    def _weighed(self, i: int, x: Any, real: Tensor | None) -> Tensor:
        """Level i times its gate."""
        one, gate = x[i], self.gates[i]
        if not self.reference:
            f, g = self.split[i](one).chunk(2, -1)
            weighed: Tensor = F.gelu(f) * gate(g, real)
            return weighed
        other = x[i + self.levels]
        if other.shape != one.shape:
            raise ValueError(
                f"topiq: level {i} is {list(one.shape)}, its reference {list(other.shape)}; want them alike"
            )
        far = ((one - other).square() + 1e-12).sqrt()
        return torch.cat([one, other, far], -1) * gate(far, real)

    def _position(self, size: Any, reach: Tensor | None, like: Tensor) -> Tensor:
        whole = torch.tensor(tuple(size), device=like.device)[None] if reach is None else reach
        rows, columns = (
            cubic_weights(_SIDE, whole[:, axis], size[axis]).to(table.dtype) @ table
            for axis, table in enumerate((self.rows, self.columns))
        )
        both = [rows[:, :, None].expand(-1, -1, size[1], -1), columns[:, None].expand(-1, size[0], -1, -1)]
        return torch.cat(both, -1).to(like.dtype)
