"""The boxes of real cells of padded grids, and what runs on each as on a grid of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def extents(real: Tensor) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """real [b, *sizes] -> rows of the batch by the box that holds their real cells, (first, last + 1) for each axis;
    rows without any are left out."""
    spans = []
    for axis in range(1, real.ndim):
        there = real.flatten(1, -1) if real.ndim == 2 else real.movedim(axis, 1).flatten(2).any(-1)
        last = there.shape[1] - there.flip(1).int().argmax(1)
        spans.append(torch.stack([there.int().argmax(1), last], 1))
    boxes: dict[tuple[tuple[int, int], ...], list[int]] = {}
    some = real.flatten(1).any(1).tolist()
    for row, box in enumerate(torch.stack(spans, 1).tolist()):
        if some[row]:
            boxes.setdefault(tuple((first, last) for first, last in box), []).append(row)
    return boxes


def over_extents(
    x: Tensor, real: Tensor | None, run: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """run(x, real) -> output and weights, on the box of real cells of each row: for what depends on the size of a grid.

    x [b, *sizes, e], real [b, *sizes] -> [b, *sizes, any] and [b, h, n, n] or None, zeros outside of the boxes. Rows of
    one box run together; real is None where all cells of the box are.
    """
    if real is None:
        return run(x, None)
    sizes, parts = x.shape[1:-1], []
    for box, rows in extents(real).items():
        cut: Any = (rows, *(slice(first, last) for first, last in box))
        seen = real[cut]
        parts.append((box, rows, *run(x[cut], None if bool(seen.all()) else seen)))
    if not parts:  # nothing is real: zeros, of the width that a run gives
        one, inner = run(x.new_zeros(1, *[1] * len(sizes), x.shape[-1]), None)
        empty = x[..., :1].masked_fill(~real[..., None], 0.0).expand(*x.shape[:-1], one.shape[-1])
        n = math.prod(sizes)
        return empty, None if inner is None else inner.new_zeros(x.shape[0], inner.shape[1], n, n)
    _, _, first, inner = parts[0]
    output = first.new_zeros(x.shape[0], *sizes, first.shape[-1])
    n = math.prod(sizes)
    weights = None if inner is None else inner.new_zeros(x.shape[0], inner.shape[1], n, n)
    cells = torch.arange(n, device=x.device).view(sizes)
    for box, rows, mixed, inner in parts:
        places: Any = tuple(slice(start, stop) for start, stop in box)
        output[(rows, *places)] = mixed
        if weights is not None and inner is not None:
            own = cells[places].flatten()
            grown = inner.new_zeros(*inner.shape[:3], n).index_copy(3, own, inner)
            weights[rows] = inner.new_zeros(*inner.shape[:2], n, n).index_copy(2, own, grown)
    return output, weights
