"""Agent attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import convolve, shown
from manyheads.functional.grid_windows import within_windows
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

BLOCK = 7  # side of the coarse bias tables, as in the paper


@register
class Agent(Mechanism):
    """A few agents, averages of queries, gather the values; every query then asks the agents.

        A = pool(Q);  V_A = softmax(A K^T / sqrt(d) + B_1) V;  O = softmax(Q A^T / sqrt(d) + B_2) V_A + DWC(V);  W_o O

    pool: adaptive averages over `agents` cells (sqrt(agents) squared on a grid); DWC: a 3 x 3 depthwise convolution.
    B: a 7 x 7 table per head and agent, bilinear to the size of the grid, plus a line per axis kept at `window` places.
    x: [b, height, width, dim] with mask [b, height, width], or [b, n, dim], which is a grid of height one with its
    agents in one row. Rows, columns and cells are counted over real tokens, so that padding changes nothing.
    Matrix: softmax(Q A^T ..) softmax(A K^T ..); the convolution is beside them.

    square: a grid is cut into windows of square x square cells, each with agents of its own (the Swin form; its
    released code ignores the mask of shifted windows, and none are shifted here). reduction: K and V come of
    LN(conv(x)), a convolution with kernel and stride of `reduction` (the PVT form, whose V is resized bilinearly before
    the convolution beside; there height and width must divide, here patches at the rim are filled up with zeros). With
    either no matrix is given.

    Source: Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, arXiv:2312.08874. The
    released code fixes the grid to window x window and treats a class token apart: here the lines are interpolated
    too (equal at that size), there is no class token, and the 1-D form is ours. No cross form: V of a context does not
    lie on the grid of x, so that there is nothing to convolve. bias: of q, k, v.
    Weights: the code's qkv is q, k, v in this order; block_bias is [an_bias, na_bias], line_bias[0] ah_bias, aw_bias,
    and line_bias[1] ha_bias, wa_bias, which have agents last there. ac_bias, ca_bias are the class token's.
    """

    card = Card(
        name="agent",
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        reference="arXiv:2312.08874",
        family=Family.TOKENS,
        patterns={"noncausal-self", "grid"},
        time="n agents",
        state="",
        decodes=False,
        example={"agents": 4, "window": 6},
        notes="No causal form: the agents are averages over all queries. Its biases of every place and its "
        "convolution, which agent-attention-pytorch leaves out, cost a quarter to a half more time than that takes.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        agents: int = 49,
        window: int = 14,
        square: int | None = None,
        reduction: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if agents < 1 or window < 1:
            raise ValueError(f"{self.card.name}: agents={agents} and window={window} must be positive")
        if reduction < 1 or (square is not None and square < 1):
            raise ValueError(f"{self.card.name}: square={square} and reduction={reduction} must be positive")
        self.agents, self.square = agents, square
        self.reduced = Reduced(dim, reduction) if reduction > 1 else None
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        # First for agents that ask tokens (B_1), then for tokens that ask agents (B_2); lines: by height, by width.
        self.block_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, heads, agents, BLOCK, BLOCK), std=0.02))
        self.line_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, 2, heads, agents, window), std=0.02))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"{self.card.name}: a dense mask was given, but tokens meet only through agents; "
                "give key padding [batch, n] as the mask"
            )
        if x.ndim == 3 and (self.square is not None or self.reduced is not None):
            raise ValueError(
                f"{self.card.name}: x has shape {tuple(x.shape)}; built with square or reduction, it wants a grid"
            )
        layout = self._layout(x)
        if self.square is not None:
            inside = within_windows(
                x, call.padding, self.square, lambda t, real: self._attend_grid(t, real, layout, False)[0]
            )
            return Result(inside)
        grid = x if x.ndim == 4 else x[:, None]
        padding = call.padding if call.padding is None or x.ndim == 4 else call.padding[:, None]
        output, weights = self._attend_grid(grid, padding, layout, call.need_weights)
        return Result(output.view_as(x), weights)

    def _layout(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of agents."""
        if x.ndim == 3:
            return 1, self.agents
        side = math.isqrt(self.agents)
        if side * side != self.agents:
            raise ValueError(
                f"{self.card.name}: a grid of shape {tuple(x.shape)} needs a square number of agents, not "
                f"{self.agents}; take {side * side} or {(side + 1) ** 2}"
            )
        return side, side

    def _attend_grid(
        self, x: Tensor, padding: Tensor | None, layout: tuple[int, int], need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        # Without padding one row stands for the whole batch, so that biases are not repeated.
        real = torch.ones_like(x[:1, ..., 0], dtype=torch.bool) if padding is None else padding
        source, held = (x, padding) if self.reduced is None else self.reduced(x, padding)
        lines = real.any(2), real.any(1)  # which rows [b, H] and columns [b, W] hold something
        there = torch.ones_like(source[:1, ..., 0], dtype=torch.bool) if held is None else held
        coarse = there.any(2), there.any(1)
        q = shown(self.q_proj(x), padding)
        k, v = (shown(p(source), held) for p in (self.k_proj, self.v_proj))
        agents, alive = self._pool(q, real, lines, layout)
        asking, answering = self._bias(0, coarse, x.dtype), self._bias(1, lines, x.dtype)
        queries, keys, values, a = (self._split(t.flatten(1, -2)) for t in (q, k, v, agents))
        a = a * self.head_dim**-0.5
        allowed = None if held is None else held.flatten(1)[:, None, None, :]
        gather = masked_softmax(a @ keys.mT + asking, allowed)
        spread = masked_softmax(queries @ a.mT + answering.mT, None if padding is None else alive[:, None, None, :])
        mixed = (spread @ (gather @ values)).transpose(1, 2).reshape(x.shape)
        if self.reduced is not None:
            v = torch.einsum("bhp,bpqe,bwq->bhwe", *_resized(lines, coarse, v))
        mixed = mixed + self.dwc(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.o_proj(mixed), spread @ gather if need_weights and self.reduced is None else None

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _pool(
        self, q: Tensor, real: Tensor, lines: tuple[Tensor, Tensor], layout: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Mean of the real queries of each cell, [b, agents, e], and whether the cell has any, [b, agents]."""
        down, across = (_cells(line, count).to(q.dtype) for line, count in zip(lines, layout, strict=True))
        counted = (down @ real.to(q.dtype) @ across.transpose(1, 2)).flatten(1)
        total = torch.einsum("bqw,bpwe->bpqe", across, torch.einsum("bph,bhwe->bpwe", down, q)).flatten(1, 2)
        return total / counted.clamp(min=1)[..., None], counted > 0

    def _bias(self, side: int, lines: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """B_1 (side 0) or the transpose of B_2 (side 1), [b, h, agents, H W]."""
        rows, columns = (
            torch.cat([_hats(line, size, dtype) for size in (BLOCK, self.line_bias.shape[-1])], -1) for line in lines
        )
        # What varies along a row is one product: of columns [b, W, 7 + window + 1] and of tables that each row reads.
        coarse = torch.einsum("hast,bys->bhayt", self.block_bias[side], rows[..., :BLOCK])
        tall = torch.einsum("has,bys->bhay", self.line_bias[side, 0], rows[..., BLOCK:])[..., None]
        wide = self.line_bias[side, 1][None, :, :, None].expand(*coarse.shape[:-1], -1)
        columns = torch.cat([columns, torch.ones_like(columns[..., :1])], -1)
        tables = torch.cat([coarse, wide, tall], -1)
        return (tables.flatten(1, 3) @ columns.mT).view(*tables.shape[:3], -1)


class Reduced(nn.Module):
    """LN(conv(x)) over patches of a grid, and which patches hold something real."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.sr, self.norm = nn.Conv2d(dim, dim, side, stride=side), nn.LayerNorm(dim)

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rim = [0, -x.shape[2] % self.side, 0, -x.shape[1] % self.side]
        patches = self.norm(convolve(self.sr, F.pad(shown(x, real), [0, 0, *rim]), None))
        if real is None:
            return patches, None
        cells = F.pad(real, rim).unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))
        return patches, cells.any(4).any(2)


def _resized(lines: tuple[Tensor, Tensor], coarse: tuple[Tensor, Tensor], v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What brings v [b, p, q, e] of coarse lines to the lines bilinearly: [b, H, p], v, [b, W, q]."""
    ways = []
    for line, short in zip(lines, coarse, strict=True):
        small, length = short.sum(1, keepdim=True), line.sum(1, keepdim=True).clamp(min=1)
        place = ((line.cumsum(1) - 0.5) * small / length - 0.5).clamp(min=0).minimum((small - 1).clamp(min=0))
        gap = place[..., None] - torch.arange(short.shape[1], device=line.device)
        ways.append(((1 - gap.abs()).clamp(min=0) * line[..., None]).to(v.dtype))
    return ways[0], v, ways[1]


def _cells(line: Tensor, count: int) -> Tensor:
    """Which of the real places of a line [b, n] fall in each of `count` cells of adaptive pooling: [b, count, n]."""
    length, rank = line.sum(1)[:, None], line.cumsum(1) - 1
    cell = torch.arange(count, device=line.device)
    start, stop = cell * length // count, ((cell + 1) * length + count - 1) // count
    return (rank[:, None] >= start[..., None]) & (rank[:, None] < stop[..., None]) & line[:, None]


def _hats(line: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Weights [b, n, size] with which the real places of a line [b, n] read a table by linear interpolation."""
    wide = torch.promote_types(dtype, torch.float32)
    length, rank = line.sum(1, keepdim=True).clamp(min=1), line.cumsum(1) - 1
    place = ((rank.to(wide) + 0.5) * size / length - 0.5).clamp(0, size - 1)
    return (1 - (place[..., None] - torch.arange(size, device=line.device)).abs()).clamp(min=0).to(dtype)
