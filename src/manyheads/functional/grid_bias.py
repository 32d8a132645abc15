"""Relative positions within windows of a grid: biases out of a table, and logits of queries with offsets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
        lag = torch.arange(self.reach, device=q.device) - torch.arange(self.block, device=q.device)[:, None]
        lag = lag + self.reach - 1
        each = q.unflatten(-2, (self.block, self.block))
        rows = torch.einsum("...ijd,iad->...ija", each, self.height.to(q.dtype)[lag])
        columns = torch.einsum("...ijd,jcd->...ijc", each, self.width.to(q.dtype)[lag])
        # In their own order: else so would the sum be, which is t wide, and would have to be copied.
        rows, columns = rows.contiguous(), columns.contiguous()
        return (rows[..., :, None] + columns[..., None, :]).flatten(-2).flatten(-3, -2)
