"""Attention over all cells of a map, and over all of its features: the two halves of dual attention networks."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.functional.precision import own_dtype
from manyheads.functional.weighted import attend_weighted


def narrow_width(dim: int, heads: int) -> int:
    """Features of queries and keys: an eighth of dim, and at least one per head."""
    return heads * max(dim // 8 // heads, 1)


def over_positions(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, heads: int, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T) v without a scale, over the real cells of maps [b, *sizes, features] -> the shape of v, and the
    weights [b, heads, cells, cells] where asked for."""
    q, k, rows = (t.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    allowed = None if real is None else real.flatten(1)[:, None, None, :]
    mixed, weights = attend_weighted(q, k, rows, allowed, scale=1.0, need_weights=need_weights)
    return mixed.transpose(1, 2).reshape(v.shape), weights


def over_features(x: Tensor, *, unlike: bool = False) -> Tensor:
    """X A of a map [b, *sizes, c] as X [b, cells, c]: A = softmax(X^T X), rows the features read; unlike: A^T =
    softmax(-X^T X), rows the features written. Padded cells are zeros."""
    cells = x.flatten(1, -2)
    wide = cells.to(torch.promote_types(x.dtype, torch.float32))  # sums of squares over a whole map
    with own_dtype(wide):
        energy = wide.transpose(1, 2) @ wide
        weights = torch.softmax(-energy, -1).transpose(1, 2) if unlike else torch.softmax(energy, -1)
    return (cells @ weights.to(cells.dtype)).view(x.shape)
