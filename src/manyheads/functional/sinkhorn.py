"""Sinkhorn's algorithm on logarithms: weights whose rows and columns have given sums."""

from __future__ import annotations

import torch
from torch import Tensor

# Far below every score, and finite: differences of it are numbers, and its exponential is zero.
NOTHING = -1e30


def transport_plan(scores: Tensor, allowed: Tensor | None, iterations: int) -> Tensor:
    """scores [..., n, m] -> exp(scores + f + g) whose rows sum to 1 and whose columns sum, once converged, to n / m.

    Columns are brought to one sum (which, does not matter: rows undo it), then rows to 1, `iterations` times, so that
    rows are exact. n and m count the rows and columns with something allowed (broadcasting to scores); others, and
    pairs that are not allowed, are zero. Computed at least in float32, in which the result is given.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if allowed is None:
        for _ in range(iterations):
            scores = scores - scores.logsumexp(-2, keepdim=True)
            scores = scores - scores.logsumexp(-1, keepdim=True)
        return scores.exp()
    allowed = allowed.expand_as(scores)
    scores = scores.masked_fill(~allowed, NOTHING)
    rows, columns = allowed.any(-1, keepdim=True), allowed.any(-2, keepdim=True)
    row_offset = torch.zeros_like(scores[..., :1])
    column_offset = torch.zeros_like(scores[..., :1, :])
    for _ in range(iterations):
        column_offset = -(scores + row_offset).logsumexp(-2, keepdim=True)
        column_offset = torch.where(columns, column_offset, 0.0)
        row_offset = -(scores + column_offset).logsumexp(-1, keepdim=True)
        row_offset = torch.where(rows, row_offset, 0.0)
    return (scores + row_offset + column_offset).exp().masked_fill(~allowed, 0.0)
