"""Attention of rows of queries that see only a slice of the keys, a block of rows at a time.

b batch, h query heads, g key/value heads, n queries, m keys, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.functional.grouped import attend_masked

# Rows worked on at once: a narrower block reads fewer keys that its mask forbids, a wider one makes fewer calls.
BLOCK = 64


def attend_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reach: Callable[[slice], slice],
    allowed: Callable[[slice, slice], Tensor],
    *,
    scale: float,
    block: int = BLOCK,
) -> Tensor:
    """q [b, h, n, d], k and v [b, g, m, d] -> [b, h, n, d]; rows with nothing to attend to are zero.

    reach: rows -> the slice of keys outside of which none of them may attend. allowed: (rows, keys) -> which of those,
    broadcasting to [b, h, rows, keys]. Memory grows with n times the width of a slice.
    """
    parts = []
    for start in range(0, q.shape[2], block):
        rows = slice(start, min(start + block, q.shape[2]))
        keys = reach(rows)
        mask = allowed(rows, keys).expand(-1, -1, rows.stop - rows.start, keys.stop - keys.start)
        parts.append(attend_masked(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask, scale=scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def real_span(padding: Tensor | None, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """padding [b, m] -> where the first real token stands and where the last one ends, [b, 1, 1] each ([1, 1, 1])."""
    if padding is None:
        return torch.tensor([[[0]]], device=device), torch.tensor([[[m]]], device=device)
    real = padding.int()
    return real.argmax(1)[:, None, None], (m - real.flip(1).argmax(1))[:, None, None]
