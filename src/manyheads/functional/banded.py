"""Attention of each query to the `window` newest keys, in blocks of queries: time and memory grow with n * window.

b batch, h query heads, g key/value heads, n queries, m keys, d head dim. Query r stands at key m - n + r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.lengths import varies

# Entries of a mask that differs from one batch row to the next, built at once.
_MASK_ENTRIES = 1 << 22


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, windows: Sequence[int], *, scale: float, padding: Tensor | None = None
) -> Tensor:
    """q [b, h, n, d], k and v [b, g, m, d], padding [b, m] (True = real) -> [b, h, n, d].

    Query r of head h attends to the windows[h] keys that end at its own; rows with nothing to attend to are zero.
    """
    shared = q.shape[1] // k.shape[1]
    keys, values = k.unbind(1), v.unbind(1)
    heads = [
        _one_head(query, keys[h // shared], values[h // shared], windows[h], scale, padding)
        for h, query in enumerate(q.unbind(1))
    ]
    return torch.stack(heads, 1)


def _one_head(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, padding: Tensor | None) -> Tensor:
    """q [b, n, d], k and v [b, m, d] -> [b, n, d]: the rows before the band is full, whole blocks of rows, the rest."""
    n, behind = q.shape[1], k.shape[1] - q.shape[1]
    block = min(max(window, 16), 64)
    if varies(n):
        return _even(q, k, v, window, block, scale, padding)
    ramp = min(max(window - 1 - behind, 0), n)
    count = (n - ramp) // block
    parts = []
    for start, stop in ((0, ramp), (ramp + count * block, n)):
        if start == stop:
            continue
        first, last = max(start + behind - window + 1, 0), stop + behind
        seen = None if padding is None else padding[:, first:last]
        parts.append(_rows(q[:, start:stop], k[:, first:last], v[:, first:last], window, scale, seen))
    if count:
        first = ramp + behind - window + 1
        seen = None if padding is None else padding[:, first:]
        body = _blocks(q[:, ramp : ramp + count * block], k[:, first:], v[:, first:], window, block, scale, seen)
        parts.insert(1 if ramp else 0, body)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _even(q: Tensor, k: Tensor, v: Tensor, window: int, block: int, scale: float, padding: Tensor | None) -> Tensor:
    """The same in whole blocks alone, for a length that varies: one block more than n // block holds the rest, a second
    makes the count never one, of which tracing would make a case of its own. All is looked up by index: whether an
    expression fits into a slice, or divides a size, would be asked of every length."""
    n, m = q.shape[1], k.shape[1]
    first = torch.arange(n // block + 2, device=q.device)[:, None] * block
    rows = first + torch.arange(block, device=q.device)
    reach = first + torch.arange(1 - window, block, device=q.device) + (m - n)
    lag = torch.arange(block, device=q.device)[:, None] - torch.arange(1 - window, block, device=q.device)
    allowed = (lag >= 0) & (lag < window) & ((reach >= 0) & (reach < m))[:, None]
    rows, reach = rows.clamp(max=n - 1), reach.clamp(0, m - 1)
    if padding is not None:
        allowed = allowed & padding[:, reach][:, :, None]
    mixed = F.scaled_dot_product_attention(q[:, rows], k[:, reach], v[:, reach], attn_mask=allowed, scale=scale)
    return mixed.flatten(1, 2)[:, torch.arange(n, device=q.device)]


def _rows(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, padding: Tensor | None) -> Tensor:
    """A few rows under one mask; the last row stands at the last key."""
    n, m = q.shape[1], k.shape[1]
    place = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
    allowed = ((place >= 0) & (place < window))[None]
    if padding is not None:
        allowed = allowed & padding[:, None]
    return F.scaled_dot_product_attention(
        q[:, None], k[:, None], v[:, None], attn_mask=allowed[:, None], scale=scale
    ).squeeze(1)


def _blocks(q: Tensor, k: Tensor, v: Tensor, window: int, block: int, scale: float, padding: Tensor | None) -> Tensor:
    """Blocks of rows as a batch, each with its own overlapping slice of keys (a view) and all with the same mask."""
    reach = block + window - 1
    queries = q.unflatten(1, (-1, block))
    count = queries.shape[1]
    keys, values = (t.unfold(1, reach, block)[:, :count].transpose(-1, -2) for t in (k, v))
    lag = torch.arange(reach, device=q.device) - torch.arange(block, device=q.device)[:, None]
    band = (lag >= 0) & (lag < window)
    if padding is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=band, scale=scale).flatten(1, 2)
    real = padding.unfold(1, reach, block)[:, :count, None]
    step = max(1, _MASK_ENTRIES // (q.shape[0] * band.numel()))
    parts = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        allowed = band & real[:, part]
        parts.append(
            F.scaled_dot_product_attention(
                queries[:, part], keys[:, part], values[:, part], attn_mask=allowed, scale=scale
            )
        )
    return torch.cat(parts, 1).flatten(1, 2)
