"""Relative positions within windows of a grid: biases out of a table, and logits of queries with offsets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def offset_index(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """[s, s] for the s cells of a window in reading order: the row of a table of offsets, key less query where
    `table = sum over axes`, that is ((query - key) + size - 1) per axis, the last axis running fastest."""
    index: Tensor | None = None
    for size in window:
        place = torch.arange(size, device=device)
        lag = place[:, None] - place[None, :] + size - 1
        if index is None:
            index = lag
        else:
            crossed = index[:, None, :, None] * (2 * size - 1) + lag[None, :, None, :]
            index = crossed.flatten(2, 3).flatten(0, 1)
    assert index is not None
    return index


class OffsetBias(nn.Module):
    """A learnt number for each head and each offset between two cells of a window: table [prod(2 size - 1), heads], as
    in Swin: offset query minus key, the last axis fastest. Called, [heads, s, s]."""

    def __init__(self, heads: int, window: Sequence[int]) -> None:
        super().__init__()
        self.window = tuple(window)
        rows = 1
        for size in self.window:
            rows *= 2 * size - 1
        self.table = nn.Parameter(torch.empty(rows, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> Tensor:
        index = offset_index(self.window, self.table.device)
        return self.table[index].permute(2, 0, 1)


class OffsetLogits(nn.Module):
    """Logits of a query with where a key stands from it, per axis: q . height[row offset] + q . width[column offset].

    The s = queries^2 queries of a window see t = reach^2 keys; height, width: [2 reach - 1, d], offset key minus query,
    queries counted from the window's first key, each as far on as a key. Shared by all heads.
    """

    def __init__(self, head_dim: int, queries: int, reach: int) -> None:
        super().__init__()
        self.block, self.reach = queries, reach
        self.height, self.width = (
            nn.Parameter(torch.randn(2 * self.reach - 1, head_dim) * head_dim**-0.5) for _ in range(2)
        )

    def forward(self, q: Tensor) -> Tensor:
        """q [.., s, d] -> [.., s, t]"""
        near = slice(self.reach - self.block, None)  # the offsets that occur
        each = F.linear(q, torch.cat([self.height[near], self.width[near]]).to(q.dtype)).flatten(-2)
        rows, columns = self._along(each)
        return (rows[..., :, None] + columns[..., None, :]).flatten(-2).flatten(-3, -2)

    def _along(self, each: Tensor) -> tuple[Tensor, Tensor]:
        """each [.., s w], w numbers of a query: those of the row offsets, then those of the column offsets -> both as
        [.., queries, queries, reach], the ones that a key of each row, and of each column, stands at. Query i begins
        block - 1 - i further on than it would, which is another step from query to query: views, without a copy."""
        count, reach = self.block, self.reach
        kinds = count + reach - 1
        wide = 2 * kinds
        lines = each[..., count - 1 :].unfold(-1, (count - 1) * wide + reach, count * wide - 1)[..., :count, :]
        columns = each.unflatten(-1, (count, -1))[..., kinds + count - 1 :].unfold(-1, reach, wide - 1)
        return lines.unfold(-1, reach, wide), columns[..., :count, :]
