"""Softmax attention to the newest keys and to a few that every query sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.grouped import masked_softmax


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, always: tuple[Tensor, Tensor], *, window: int, scale: float
) -> Tensor:
    """q [b, h, n, d], k and v [b, h, window - 1 + n, d], real [b, window - 1 + n]; always: k and v [h, p, d], seen by
    every query. Query r attends to keys r .. r + window - 1, its own the last, and to those -> [b, h, n, d]."""
    b, n, before = q.shape[0], q.shape[2], window - 1
    block = min(max(window, 16), n)
    short = -n % block
    queries = F.pad(q, (0, 0, 0, short)).unflatten(2, (-1, block))
    keys, values = (F.pad(t, (0, 0, 0, short)).unfold(2, block + before, block).transpose(-1, -2) for t in (k, v))
    there = F.pad(real, (0, short)).unfold(1, block + before, block)[:, None, :, None]
    lag = torch.arange(block + before, device=q.device) - torch.arange(block, device=q.device)[:, None]
    allowed = ((lag >= 0) & (lag < window)) & there
    shape = (b, -1, queries.shape[2], -1, -1)
    first, first_values = (t.to(q.dtype)[None, :, None].expand(*shape) for t in always)
    keys, values = torch.cat((first, keys), 3), torch.cat((first_values, values), 3)
    weights = masked_softmax(queries @ keys.mT * scale, F.pad(allowed, (first.shape[3], 0), value=True))
    return (weights @ values).flatten(2, 3)[:, :, :n]
