"""Softmax attention of some queries over some keys, tile by tile, to be joined with that over other keys.

b batch, g key/value heads, r query heads of each, n queries, m keys. Queries stand as [b, g, r, n, d]: keys and values
are never expanded. All sums are at least float32, under autocast too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.functional.linear import widen
from manyheads.functional.precision import own_dtype
from manyheads.parallel.layout import Piece

# Queries and keys whose scores are built at once: what bounds the memory, whatever the length.
TILE = 512


@dataclass(frozen=True)
class Rule:
    """Who sees whom: the past alone if causal, and of that the last `window` tokens, a token itself included."""

    scale: float
    causal: bool
    window: int | None


class Side(NamedTuple):
    """Where a shard's tokens stand in the sequence, and [b, count] numbers of documents (-1: a key that is padding)."""

    pieces: list[Piece]
    documents: Tensor | None


class Tile(NamedTuple):
    rows: slice
    columns: slice
    allowed: Tensor | None


def tiles(queries: Side, keys: Side, rule: Rule, device: torch.device) -> Iterator[Tile]:
    """The pairs of parts in which some query may see some key; all else is not computed."""
    for q in _cut(queries.pieces):
        for k in _cut(keys.pieces):
            nearest, farthest = q.first - (k.first + k.size - 1), q.first + q.size - 1 - k.first
            if (rule.causal and farthest < 0) or (rule.window is not None and nearest >= rule.window):
                continue
            allowed = None
            if (rule.causal and nearest < 0) or (rule.window is not None and farthest >= rule.window):
                behind = _numbers(q, device)[:, None] - _numbers(k, device)
                allowed = behind >= 0 if rule.causal else torch.ones_like(behind, dtype=torch.bool)
                allowed = allowed if rule.window is None else allowed & (behind < rule.window)
            rows, columns = slice(q.start, q.start + q.size), slice(k.start, k.start + k.size)
            if queries.documents is not None and keys.documents is not None:
                same = queries.documents[:, rows, None] == keys.documents[:, None, columns]
                allowed = same if allowed is None else allowed & same
                if not allowed.any():
                    continue
                allowed = allowed[:, None, None]
            yield Tile(rows, columns, allowed)


def _cut(pieces: list[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        for start in range(0, piece.size, TILE):
            yield Piece(piece.start + start, piece.first + start, min(TILE, piece.size - start))


def _numbers(piece: Piece, device: torch.device) -> Tensor:
    return torch.arange(piece.first, piece.first + piece.size, device=device)


class Sums:
    """What queries [b, g, r, n, d] have read so far: out [b, g, r, n, dv] and lse, the log of their sum of weights.

    Two sets of keys are joined by out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i): no exponent is
    positive. Queries that have seen no key have lse -inf and out 0.
    """

    def __init__(self, q: Tensor, width: int) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        self.out = q.new_zeros((*q.shape[:-1], width), dtype=wide)
        self.lse = q.new_full(q.shape[:-1], -torch.inf, dtype=wide)

    def of(self, heads: slice) -> Sums:
        """Those of some key heads, in the same memory."""
        part = object.__new__(Sums)
        part.out, part.lse = self.out[:, heads], self.lse[:, heads]
        return part

    def add(self, q: Tensor, k: Tensor, v: Tensor, parts: Iterator[Tile], scale: float) -> None:
        """The same queries read k, v [b, g, m, .]."""
        for rows, columns, allowed in parts:
            scores = _scores(q[..., rows, :], k[:, :, columns], allowed, scale)
            lse = scores.logsumexp(-1)
            weights = _weights(scores, lse)
            out = _over(weights, widen(v[:, :, columns]))
            before, joined = self.lse[..., rows], torch.logaddexp(self.lse[..., rows], lse)
            self.out[..., rows, :] *= _share(before, joined)
            self.out[..., rows, :] += out * _share(lse, joined)
            self.lse[..., rows] = joined


class Slopes(NamedTuple):
    """What the backward pass knows of the queries: q [b, g, r, n, d], the gradient of the result, lse, and [b, g, r, n]
    the sum of the result times its gradient."""

    q: Tensor
    gradient: Tensor
    lse: Tensor
    dots: Tensor


def slopes(at: Slopes, k: Tensor, v: Tensor, parts: Iterator[Tile], scale: float, dq: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of k and v as far as these queries go; that of q is added to dq."""
    dk, dv = (torch.zeros_like(x, dtype=dq.dtype) for x in (k, v))
    for rows, columns, allowed in parts:
        q, gradient = widen(at.q[..., rows, :]), at.gradient[..., rows, :]
        keys, values = widen(k[:, :, columns]), widen(v[:, :, columns])
        weights = _weights(_scores(q, keys, allowed, scale), at.lse[..., rows])
        dv[:, :, columns] += _under(weights, gradient)
        change = weights * (_over(gradient, values.mT) - at.dots[..., rows, None]) * scale
        dq[..., rows, :] += _over(change, keys)
        dk[:, :, columns] += _under(change, q)
    return dk, dv


def _scores(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    scores = _over(widen(q) * scale, widen(k).mT)
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); zeros in rows that see nothing, whose lse is -inf."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()


def _share(lse: Tensor, joined: Tensor) -> Tensor:
    return (lse - joined.masked_fill(joined == -torch.inf, 0.0)).exp()[..., None]


def _over(a: Tensor, b: Tensor) -> Tensor:
    """[b, g, r, n, x] by [b, g, x, y] -> [b, g, r, n, y]."""
    with own_dtype(a):
        return (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])


def _under(a: Tensor, b: Tensor) -> Tensor:
    """[b, g, r, n, x] and [b, g, r, n, y] -> [b, g, x, y], summed over queries and over the heads of a group."""
    with own_dtype(a):
        return a.flatten(2, 3).mT @ b.flatten(2, 3)
