"""Routing of queries to blocks of keys by the blocks' mean keys, and attention to the blocks chosen.

b batch, h query heads, g key/value heads, n queries, m keys, d head dim, c blocks. Query head h reads key head h // r,
r = h / g. Nothing here lets a gradient through the choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.grouped import grouped_scores
from manyheads.functional.lengths import spans, varies

# Queries whose gates are held at once.
_GATE_ROWS = 2048


def block_ids(positions: Tensor, block: int) -> Tensor:
    """positions [b, m] -> the number of each token's block, counted from 0 along the sequence.

    A block ends where position // block changes, and where positions start again: numbers never fall along the
    sequence, so that an earlier block holds earlier tokens only, whatever the positions are.
    """
    own = positions // block
    before = (torch.arange(positions.shape[1], device=positions.device) - 1).clamp(min=0)
    return ((own != own[:, before]) | (positions < positions[:, before])).long().cumsum(1)


def block_means(k: Tensor, ids: Tensor, blocks: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """k [b, g, m, d], ids [b or 1, m], real [b, m] -> mean keys [b, g, c, d], at least float32, and which blocks [b, c]
    hold a real token."""
    b, g, m, d = k.shape
    ids = ids.expand(b, m)
    counted = torch.ones_like(ids) if real is None else real.long()
    count = ids.new_zeros(b, blocks).scatter_add_(1, ids, counted)
    k = k.detach().to(torch.promote_types(k.dtype, torch.float32))
    if real is not None:
        k = k.masked_fill(~real[:, None, :, None], 0.0)
    rows = (ids + blocks * torch.arange(b, device=k.device)[:, None]).flatten()
    total = k.new_zeros(b * blocks, g * d).index_add_(0, rows, k.transpose(1, 2).reshape(b * m, g * d))
    means = total.view(b, blocks, g, d).transpose(1, 2) / count.clamp(min=1)[:, None, :, None]
    return means, count > 0


def mean_gates(q: Tensor, means: Tensor, filled: Tensor) -> Tensor:
    """q [b, h, n, d] -> <q, mean key> without a scale, [b, h, n, c], at least float32; -inf where no key is real."""
    gates = grouped_scores(q.detach().to(means.dtype), means)
    return gates.masked_fill(~filled[:, None, None], -torch.inf)


def masked_gates(q: Tensor, k: Tensor, ids: Tensor, blocks: int, allowed: Tensor) -> Tensor:
    """The same where each query may see its own part of the keys, allowed [b, h, n, m]: the mean is over those."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = grouped_scores(q.detach().to(wide), k.detach().to(wide))
    allowed, index = allowed.expand_as(scores), ids[:, None, None].expand_as(scores)
    empty = scores.new_zeros(*scores.shape[:3], blocks)
    total = empty.scatter_add(-1, index, scores.masked_fill(~allowed, 0.0))
    count = empty.scatter_add(-1, index, allowed.to(wide))
    return (total / count.clamp(min=1)).masked_fill(count == 0, -torch.inf)


def choose_blocks(gates: Tensor, own: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k - 1 blocks of largest gate among those before the query's own block, own [b or 1, n].

    Indices [b, h, n, min(top_k - 1, c)] and which of them are chosen: early queries have fewer blocks behind them.
    """
    past = torch.arange(gates.shape[-1], device=gates.device) < own[:, None, :, None]
    values, index = gates.masked_fill(~past, -torch.inf).topk(min(top_k - 1, gates.shape[-1]), -1)
    return index, values > -torch.inf


def choose_past_blocks(q: Tensor, k: Tensor, block: int, top_k: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """choose_blocks for the newest n of m tokens, with blocks counted from the first key; a slice of rows at a time."""
    n, m = q.shape[2], k.shape[2]
    own = torch.arange(m - n, m, device=q.device)[None] // block
    # Blocks before the newest query's are whole; its own takes no part.
    whole = (m - 1) // block
    kept = whole * block
    if varies(m):  # every block, and empty ones behind them, so that there are always enough to choose from
        whole, kept = m // block + top_k, m
    if whole == 0 or top_k == 1:
        none = q.new_zeros(*q.shape[:3], 0, dtype=torch.long)
        return none, none.bool()
    ids = torch.arange(kept, device=q.device)[None] // block
    seen = None if real is None else real[:, :kept]
    means, filled = block_means(k[:, :, :kept], ids, whole, seen)
    parts = [
        choose_blocks(mean_gates(q[:, :, rows], means, filled), own[:, rows], top_k) for rows in spans(n, _GATE_ROWS)
    ]
    return torch.cat([index for index, _ in parts], 2), torch.cat([chosen for _, chosen in parts], 2)


def block_mask(index: Tensor, chosen: Tensor, own: Tensor, ids: Tensor, blocks: int) -> Tensor:
    """What choose_blocks chose, and the query's own block, as a mask over tokens [b, h, n, m]."""
    mask = chosen.new_zeros(*chosen.shape[:3], blocks).scatter_(-1, index, chosen)
    mask = mask.scatter_(-1, own[:, None, :, None].expand(*mask.shape[:3], 1), True)
    return mask.gather(-1, ids[:, None, None].expand(*mask.shape[:3], -1))


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, chosen: Tensor, block: int, *, scale: float, real: Tensor | None
) -> Tensor:
    """One query per row and head, q [b, h, 1, d], on the tokens of its blocks (index, chosen [b, h, 1, s]) and of the
    last block; no other key or value is read."""
    (b, h), (g, m), device = q.shape[:2], k.shape[1:3], q.device
    blocks = F.pad(index, (0, 1), value=(m - 1) // block).view(b, h, -1, 1)
    tokens = (blocks * block + torch.arange(block, device=device)).flatten(2)
    allowed = F.pad(chosen, (0, 1), value=True).view(b, h, -1, 1).expand(-1, -1, -1, block).flatten(2) & (tokens < m)
    tokens = tokens.clamp(max=m - 1)
    rows = torch.arange(b, device=device)[:, None, None]
    heads = torch.arange(h, device=device)[:, None] // (h // g)
    if real is not None:
        allowed = allowed & real[rows, tokens]
    keys, values = k[rows, heads, tokens], v[rows, heads, tokens]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed[:, :, None], scale=scale)
