"""Causal attention of each query to chosen earlier blocks of keys and to its own block, without an n x n matrix.

Queries that chose the same block stand together in tiles of rows, each tile meets its block once, and the partial
results are merged by their log-sum-exp. The backward pass recomputes the tiles with the merged log-sum-exp. Both are
operators of their own, because the number of tiles depends on the data: torch.compile takes them as they are. A few
heads are worked on at a time, so that their rows stay in the cache. Exponentials are powers of two, which are faster.

b batch, h query heads, g key/value heads, n tokens, d head dim, c blocks, s chosen blocks per query, t tiles.
R = b h c block rows of queries (the last block padded); block p of key head (b, g) is number (b g) c + p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.precision import own_dtype

_TILE = 64  # rows of queries in a tile
_CHUNK = 32  # tiles computed at once
_SHARE = 16384  # rows of queries worked on at a time
_LOG2E = math.log2(math.e)


class _Plan(NamedTuple):
    """pairs [t, tile]: which (row, choice) stands where, numbered row * s + choice, or R s for nobody; rows [t, tile]:
    the row of each; key [t]: the block of keys that a tile meets; missing: the choices that were not made."""

    pairs: Tensor
    rows: Tensor
    key: Tensor
    missing: Tensor


class _Tiles(NamedTuple):
    """q, and what else has a row per query: [b h c, block, d]. k times scale log2(e), and v: [b g c, block, d]. real
    [b g c, block] or None. own [b h c]: the block of keys that each block of queries stands in."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor | None
    own: Tensor


def _whole(tensor: Tensor, blocks: int, block: int, wide: torch.dtype) -> Tensor:
    """[b, heads, n, d] -> its own contiguous [b * heads * c, block, d], zeros behind the last token."""
    (b, h, n, d), rows = tensor.shape, blocks * block
    whole = tensor.new_empty(b, h, rows, d, dtype=wide)
    whole[:, :, :n] = tensor
    whole[:, :, n:] = 0.0
    return whole.view(-1, block, d)


def _tiles(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, block: int, scale: float) -> _Tiles:
    (b, h, n, _), g = q.shape, k.shape[1]
    blocks, wide = -(-n // block), torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (_whole(t, blocks, block, wide) for t in (q, k, v))
    head = torch.arange(b * h, device=q.device)[:, None]
    own = (_key_head(head, h, g) * blocks + torch.arange(blocks, device=q.device)).flatten()
    if real is not None:
        real = F.pad(real, (0, blocks * block - n))[:, None].expand(-1, g, -1).reshape(-1, block)
    return _Tiles(queries, keys.mul_(scale * _LOG2E), values, real, own)


def _key_head(head: Tensor, h: int, g: int) -> Tensor:
    """Number of the key head, over the batch, that query head number `head` reads."""
    return head // h * g + head % h // (h // g)


def _plan(index: Tensor, chosen: Tensor, g: int, blocks: int, block: int) -> _Plan:
    """index, chosen [b, h, n, s] -> tiles in the order of their blocks."""
    b, h, n, s = index.shape
    device, total, nobody = index.device, b * g * blocks, b * h * blocks * block * s
    head = torch.arange(b * h, device=device).view(b, h, 1, 1)
    target = torch.where(chosen, _key_head(head, h, g) * blocks + index, total).flatten()
    row = head * blocks * block + torch.arange(n, device=device)[:, None]
    pair = (row * s + torch.arange(s, device=device)).flatten()
    target, order = target.sort(stable=True)
    counts = torch.bincount(target, minlength=total + 1)[:total]
    made = int(counts.sum())
    count = (counts + _TILE - 1) // _TILE
    gaps = (count.cumsum(0) - count) * _TILE - (counts.cumsum(0) - counts)
    key = torch.repeat_interleave(torch.arange(total, device=device), count)
    pairs = pair.new_full((len(key) * _TILE,), nobody)
    pairs[torch.arange(made, device=device) + gaps[target[:made]]] = pair[order[:made]]
    rows = (pairs // max(s, 1)).clamp_(max=b * h * blocks * block - 1)
    return _Plan(pairs.view(-1, _TILE), rows.view(-1, _TILE), key, pair[order[made:]])


def _chunks(key: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(key), _CHUNK):
        yield slice(start, start + _CHUNK), key[start : start + _CHUNK]


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.index_select(0, index.flatten()).view(*index.shape, *tensor.shape[1:])


def _scores(q: Tensor, k: Tensor, real: Tensor | None, causal: bool) -> Tensor:
    """q [t, rows, d], k [t, block, d] as in _Tiles, real [t, block] -> [t, rows, block], -inf where not allowed."""
    scores = torch.bmm(q, k.mT)
    if causal:
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(future, -torch.inf)
    if real is not None:
        scores.masked_fill_(~real[:, None], -torch.inf)
    return scores


def _partial(q: Tensor, tiles: _Tiles, key: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax of q [t, rows, d] over one block each, [t, rows, d], and its log-sum-exp to the base of two."""
    scores = _scores(q, _take(tiles.k, key), None if tiles.real is None else tiles.real[key], causal)
    finite = torch.finfo(scores.dtype)
    top = scores.amax(-1, keepdim=True).clamp_(min=finite.min)
    weights = scores.sub_(top).exp2_()
    total = weights.sum(-1, keepdim=True)
    mixed = torch.bmm(weights, _take(tiles.v, key)).div_(total.clamp(min=finite.tiny))
    return mixed, total.log2_().add_(top).squeeze(-1)


def _merge(mixed: Tensor, lse: Tensor, others: Tensor, others_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Partial results [R, d] and [R, s, d] by their log-sum-exp [R] and [R, s]; rows that saw nothing are zero."""
    every = torch.cat([lse[:, None], others_lse], 1)
    total = (every / _LOG2E).logsumexp(1) * _LOG2E
    share = (every - total.masked_fill(total == -torch.inf, 0.0)[:, None]).exp2_()
    out = mixed.mul_(share[:, :1])
    for choice in range(others.shape[1]):
        out.addcmul_(others[:, choice], share[:, choice + 1, None])
    return out, total


def _attend(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, chosen: Tensor, real: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [b, h, n, d], and log-sum-exp [b, h, c * block] to the base of two."""
    (b, h, n, d), s = q.shape, index.shape[-1]
    tiles = _tiles(q, k, v, real, block, scale)
    size = tiles.q.shape[0] * block
    mixed, lse = torch.empty_like(tiles.q), tiles.q.new_empty(tiles.q.shape[:2])
    for part, key in _chunks(tiles.own):
        mixed[part], lse[part] = _partial(tiles.q[part], tiles, key, True)

    # One row more than there are choices: what nobody asked for is written there.
    plan = _plan(index, chosen, k.shape[1], -(-n // block), block)
    others = tiles.q.new_empty(size * s + 1, d).index_fill_(0, plan.missing, 0.0)
    others_lse = tiles.q.new_full((size * s + 1,), -torch.inf)
    rows = tiles.q.view(size, d)
    for part, key in _chunks(plan.key):
        pairs = plan.pairs[part]
        others[pairs], others_lse[pairs] = _partial(_take(rows, plan.rows[part]), tiles, key, False)
    out, lse = _merge(mixed.view(size, d), lse.view(size), others[:-1].view(size, s, d), others_lse[:-1].view(size, s))
    return out.view(b, h, -1, d)[:, :, :n], lse.view(b, h, -1)


def _weights(q: Tensor, tiles: _Tiles, key: Tensor, lse: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of one block each, [t, rows, block], under the merged log-sum-exp, and the block's keys and values."""
    k, v = _take(tiles.k, key), _take(tiles.v, key)
    scores = _scores(q, k, None if tiles.real is None else tiles.real[key], causal)
    return scores.sub_(lse[..., None]).exp2_(), k, v


def _differentiate(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    chosen: Tensor,
    real: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v."""
    (_, _, n, d), s = q.shape, index.shape[-1]
    blocks, tiles = -(-n // block), _tiles(q, k, v, real, block, scale)
    size = tiles.q.shape[0] * block
    grads, outs = (_whole(t, blocks, block, lse.dtype) for t in (grad, out))
    # sum_j P_ij dP_ij = <dO_i, O_i>, over all that row i attends to: one number per row serves all its tiles.
    delta = outs.mul_(grads).sum(-1)
    # 2^(s - inf) = 0: rows that saw nothing take no part.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf).view(-1, block)
    dq, dk, dv = torch.empty_like(tiles.q), torch.zeros_like(tiles.k), torch.zeros_like(tiles.v)

    def add(q: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, key: Tensor, causal: bool) -> Tensor:
        weights, k, v = _weights(q, tiles, key, lse, causal)
        dv.index_add_(0, key, torch.bmm(weights.mT, grad))
        scores = torch.bmm(grad, v.mT).sub_(delta[..., None]).mul_(weights)
        dk.index_add_(0, key, torch.bmm(scores.mT, q))
        return torch.bmm(scores, k)

    for part, key in _chunks(tiles.own):
        dq[part] = add(tiles.q[part], grads[part], lse[part], delta[part], key, True)

    plan = _plan(index, chosen, k.shape[1], blocks, block)
    others = dq.new_empty(size * s + 1, d).index_fill_(0, plan.missing, 0.0)
    queries, grads, delta, lse = tiles.q.view(size, d), grads.view(size, d), delta.view(size), lse.view(size)
    for part, key in _chunks(plan.key):
        pairs, rows = plan.pairs[part], plan.rows[part]
        above = lse[rows].masked_fill_(pairs == size * s, torch.inf)
        others[pairs] = add(_take(queries, rows), _take(grads, rows), above, delta[rows], key, False)
    dq = dq.view(size, d)
    for choice in range(s):
        dq.add_(others[:-1].view(size, s, d)[:, choice])
    ours = (dq.mul_(1 / _LOG2E), dk.mul_(scale), dv)
    return tuple(t.view(*like.shape[:2], -1, d)[:, :, :n] for t, like in zip(ours, (q, k, v), strict=True))


def _shares(b: int, h: int, g: int, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of batch, query heads and key heads with about _SHARE rows of queries each."""
    fit, shared = max(1, _SHARE // rows), h // g
    step = max(1, fit // h)
    heads = g if fit >= h else max(1, fit // shared)
    for first in range(0, b, step):
        for head in range(0, g, heads):
            yield slice(first, first + step), slice(head * shared, (head + heads) * shared), slice(head, head + heads)


@torch.library.custom_op("manyheads::block_sparse", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, chosen: Tensor, real: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q, k, v, index, chosen, real, block, scale)
    for b, h, g in _shares(q.shape[0], q.shape[1], k.shape[1], lse.shape[2]):
        seen = None if real is None else real[b]
        with own_dtype(q):
            out[b, h], lse[b, h] = _attend(q[b, h], k[b, g], v[b, g], index[b, h], chosen[b, h], seen, block, scale)
    return out, lse


@_forward.register_fake
def _outputs(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, chosen: Tensor, real: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(q.dtype, torch.float32)
    return out, q.new_empty(b, h, -(-n // block) * block, dtype=wide)


@torch.library.custom_op("manyheads::block_sparse_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    chosen: Tensor,
    real: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _gradients(grad, q, k, v, out, lse, index, chosen, real, block, scale)
    for b, h, g in _shares(q.shape[0], q.shape[1], k.shape[1], lse.shape[2]):
        ours = grad[b, h], q[b, h], k[b, g], v[b, g], out[b, h], lse[b, h], index[b, h], chosen[b, h]
        seen = None if real is None else real[b]
        with own_dtype(q):
            dq[b, h], dk[b, g], dv[b, g] = _differentiate(*ours, seen, block, scale)
    return dq, dk, dv


@_backward.register_fake
def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    chosen: Tensor,
    real: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, chosen, real, ctx.block, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, index, chosen, real)
    ctx.mark_non_differentiable(output[1])


def _chain(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.block, ctx.scale), None, None, None, None, None)


_forward.register_autograd(_chain, setup_context=_keep)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, chosen: Tensor, block: int, *, scale: float, real: Tensor | None
) -> Tensor:
    """q [b, h, n, d], k and v [b, g, n, d] -> [b, h, n, d]: token i attends to the tokens j <= i of its own block and
    to those of the blocks index [b, h, n, s], where chosen, all of them earlier ones. real: [b, n], True = real."""
    return _forward(q, k, v, index, chosen, real, block, scale)[0]
