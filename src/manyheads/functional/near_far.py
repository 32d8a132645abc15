"""Softmax over the newest keys and a linear kernel over all that lie behind them, under one denominator.

    out_i = (g sum_near e^(s_ij - m_i) v_j + sum_far phi(q_i) . phi(k_j) v_j) / (the same with v = 1)

near: the `window` newest real tokens, i among them. s_ij = scale q_i . k_j, m_i the largest of the near ones, g one
number per head. b batch, h heads, n queries, m keys, d head dim, f features. Tokens that are not there take no place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.functional.linear import Kernel, hide, widen


class Tail(NamedTuple):
    """What later passes need: keys and values [b, h, w, d] of the tokens that may still be near, w < window, those that
    are there last, real [b, w]; memory [b, h, f, d + 1], in which all others are summed."""

    keys: Tensor
    values: Tensor
    real: Tensor
    memory: Tensor


class Mixer(NamedTuple):
    """kernel: of the far. share: g, [h]. scale: of the near scores. window: how many are near."""

    kernel: Kernel
    share: Tensor
    scale: float
    window: int


def near_far_matrix(
    q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, *, padding: Tensor | None = None, dense: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q, k, v [b, h, n, d] -> mixed and the weights [b, h, n, n]: the specification. A query that is not there, and
    one with nothing to attend to, gives zeros."""
    q, k, v = widen(q), widen(hide(k, padding)), widen(hide(v, padding))
    n = q.shape[2]
    real = torch.ones(1, n, dtype=torch.bool, device=q.device) if padding is None else padding
    place = real.cumsum(1)
    lag = place[:, None, :, None] - place[:, None, None, :]
    past = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    allowed = past & real[:, None, None, :] & real[:, None, :, None]
    if dense is not None:
        allowed = allowed & dense
    near = _near(q @ k.mT * mixer.scale, allowed & (lag < mixer.window), mixer.share)
    far = _far(q, k, mixer.kernel).masked_fill(~(allowed & (lag >= mixer.window)), 0.0)
    weights = near + far
    weights = weights / _divisor(weights.sum(-1, keepdim=True))
    return weights @ v, weights


def near_far_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Mixer,
    *,
    padding: Tensor | None = None,
    tail: Tail | None = None,
    keep: bool = False,
    chunk: int,
) -> tuple[Tensor, Tail | None]:
    """The same in time and memory that grow with n (window + chunk), behind the tokens of a tail. keep: the tail that
    follows is wanted. Values of padding may be anything."""
    n = q.shape[2]
    if padding is not None:
        k, v = hide(k, padding), hide(v, padding)
    order = None if padding is None else padding.int().argsort(dim=1, stable=True)
    q = _sorted(q, order)
    keys, values, real = _joined(k, v, padding, tail, mixer.window)
    before = keys.shape[2] - n
    memory, outs = None if tail is None else tail.memory, []
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        part = slice(start, stop + before)
        more = keep or stop < n
        features = mixer.kernel.key(widen(keys[:, :, start:stop])) if more or stop - start > 1 else None
        mixed = _chunk(
            q[:, :, start:stop], keys[:, :, part], values[:, :, part], real[:, part], mixer, features, memory
        )
        outs.append(mixed)
        if more:
            assert features is not None
            gone = slice(start, stop)
            memory = _remembered(memory, features, values[:, :, gone], real[:, gone], mixer.kernel)
    mixed = torch.cat(outs, 2)
    if order is not None:
        assert padding is not None
        mixed = hide(_sorted(mixed, order.argsort(1)), padding)
    if not keep:
        return mixed, None
    assert memory is not None
    # Copies: a view would hold the keys of the whole pass for as long as the tail lives.
    return mixed, Tail(keys[:, :, n:].clone(), values[:, :, n:].clone(), real[:, n:].clone(), memory)


def _joined(
    k: Tensor, v: Tensor, padding: Tensor | None, tail: Tail | None, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and which are there, of the tail and the pass: real ones last, as many before the pass's n as can be
    near and at least so many empty ones that none of those that stay near is among the first n."""
    b, _, n, _ = k.shape
    real = torch.ones(b, n, dtype=torch.bool, device=k.device) if padding is None else padding
    held = 0
    if tail is not None:
        held = tail.real.shape[1]
        k, v = torch.cat((tail.keys, k), 2), torch.cat((tail.values, v), 2)
        real = torch.cat((tail.real, real), 1)
    if padding is not None:
        order = real.int().argsort(dim=1, stable=True)
        k, v, real = _sorted(k, order), _sorted(v, order), real.gather(1, order)
    empty = min(window - 1, held + n) - held
    if empty:
        k, v = (torch.cat((t.new_zeros(*t.shape[:2], empty, t.shape[3]), t), 2) for t in (k, v))
        real = torch.cat((real.new_zeros(b, empty), real), 1)
    return k, v, real


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, mixer: Mixer, features: Tensor | None, memory: Tensor | None
) -> Tensor:
    """c queries, the c + w keys that end with theirs (query r: near are r .. r + w), the mapped first c of these keys
    where c > 1, and the memory of those before. Masks are added and multiplied: to fill in is slower than exp."""
    c, before = q.shape[2], k.shape[2] - q.shape[2]
    q, k, v = widen(q), widen(k), widen(v)
    lag = torch.arange(c + before, device=q.device) - torch.arange(c, device=q.device)[:, None]
    there = real[:, None, None, :]
    hidden = torch.zeros((), dtype=q.dtype, device=q.device).where((lag >= 0) & (lag <= before) & there, -torch.inf)
    scores = q @ k.mT * mixer.scale + hidden
    near = (scores - _largest(scores)).exp()
    # The share multiplies what was summed, not every weight.
    share = mixer.share.to(q.dtype)[:, None, None]
    total, sums = share * near.sum(-1, keepdim=True), share * (near @ v)
    query = mixer.kernel.query(q)
    if c > 1:
        assert features is not None
        far = mixer.kernel.value(query @ features.mT) * ((lag < 0)[:, :c] & there[..., :c]).to(q.dtype)
        total, sums = total + far.sum(-1, keepdim=True), sums + far @ v[:, :, :c]
    if memory is not None:
        past = mixer.kernel.features(query) @ memory
        total, sums = total + past[..., -1:], sums + past[..., :-1]
    return sums / _divisor(total)


def _largest(scores: Tensor) -> Tensor:
    """Of each row, zero where nothing is allowed."""
    largest = scores.amax(-1, keepdim=True)
    return torch.where(largest.isneginf(), torch.zeros_like(largest), largest)


def _near(scores: Tensor, allowed: Tensor, share: Tensor) -> Tensor:
    """g e^(s - m) where allowed, else zero."""
    scores = scores.masked_fill(~allowed, -torch.inf)
    return share.to(scores.dtype)[:, None, None] * (scores - _largest(scores)).exp()


def _far(q: Tensor, k: Tensor, kernel: Kernel) -> Tensor:
    return kernel.value(kernel.query(q) @ kernel.key(k).mT)


def _remembered(memory: Tensor | None, k: Tensor, v: Tensor, real: Tensor, kernel: Kernel) -> Tensor:
    """k: mapped keys."""
    values = widen(v)
    values = hide(torch.cat((values, torch.ones_like(values[..., :1])), -1), real)
    new = kernel.features(k).mT @ values
    return new if memory is None else memory + new


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, torch.ones_like(total))


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    """x [b, h, n, d] with its rows in the order [b, n]."""
    return x if order is None else x.gather(2, order[:, None, :, None].expand_as(x))
