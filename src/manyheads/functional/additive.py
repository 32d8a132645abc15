"""Additive scores, u . tanh(q_i + k_j), of all pairs in slices of the queries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Hidden values held at once, over batch, heads, rows, keys and features.
HIDDEN = 1 << 22


def additive_scores(q: Tensor, k: Tensor, direction: Tensor) -> Tensor:
    """q [b, h, n, d], k [b, h, m, d], direction [h, d] -> [b, h, n, m]."""
    rows = max(1, HIDDEN // k.numel())
    if rows >= q.shape[2]:
        return _rows(q, k, direction)
    # Under autograd each slice is computed again in the backward pass: its hidden values are not kept.
    parts = [checkpoint(_rows, part, k, direction, use_reentrant=False) for part in q.split(rows, 2)]
    return torch.cat(parts, 2)


def _rows(q: Tensor, k: Tensor, direction: Tensor) -> Tensor:
    return torch.einsum("bhnmd,hd->bhnm", (q[:, :, :, None] + k[:, :, None]).tanh(), direction)
