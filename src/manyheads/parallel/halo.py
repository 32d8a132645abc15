"""Windows and short convolutions: a process needs of the others the few tokens that stand before its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.functional.banded import banded_attention
from manyheads.parallel.layout import Layout
from manyheads.parallel.wire import swap


def tokens_before(x: Tensor, count: int, layout: Layout, dim: int = 1) -> Tensor:
    """The `count` tokens of the sequence before this process's first: x [b, n, ...] -> [b, count, ...].

    By a contiguous layout; dim: the axis of tokens. Zeros where the sequence has not begun. They are sent by those who
    hold them, several processes where shards are shorter than count, and their gradients go the same way back: at most
    count tokens each way and process, however long the sequence is. All processes call alike.
    """
    if layout.kind != "contiguous":
        raise ValueError(
            f"tokens_before: a {layout.kind} layout was given; want Layout(length, 'contiguous'), in which one process "
            "ends where the next begins"
        )
    if count < 0:
        raise ValueError(f"tokens_before: count={count} was given; want 0 or more")
    layout.check("tokens_before", x.shape[dim])
    found: Tensor = _Before.apply(x.movedim(dim, 0), count, layout)
    return found.movedim(0, dim)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    windows: Sequence[int],
    *,
    padding: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the newest tokens alone: i - windows[head] < j <= i; [b, h, n, dv].

    q [b, h, n, d], k [b, g, n, d], v [b, g, n, dv] of this process's tokens by a contiguous layout; padding [b, n],
    True = real, given by all or by none. Each process gets the max(windows) - 1 keys and values before its own, once,
    and gives back their gradients: where a ring would send all P - 1 shards. Rows that see nothing are zero.
    """
    if len(windows) != q.shape[1] or min(windows) < 1:
        raise ValueError(
            f"windowed_attention: windows={list(windows)} for {q.shape[1]} heads; want one of 1 or more each"
        )
    reach, width = max(windows) - 1, k.shape[-1]
    both = tokens_before(torch.cat((k, v), -1), reach, layout, 2)
    if q.shape[2] == 0:
        # No token of this process asks, and still its gradients, of no elements, hang on what was given.
        return q.sum(-1, keepdim=True).expand(*q.shape[:-1], v.shape[-1]) + 0.0 * both.sum()
    # Rows of a sequence that has not begun are hidden, as padding is.
    first = layout.pieces()[0].first if layout.count() else 0
    missing = max(0, reach - first)
    if padding is None and missing == 0:
        seen = None
    else:
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if padding is None else padding
        earlier = torch.ones(q.shape[0], reach, dtype=torch.bool, device=q.device)
        if padding is not None:
            earlier = tokens_before(padding.to(torch.int8), reach, layout) > 0
        earlier = earlier & (torch.arange(reach, device=q.device) >= missing)
        seen = torch.cat((earlier, real), 1)
    k, v = (torch.cat(pair, 2) for pair in ((both[..., :width], k), (both[..., width:], v)))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return banded_attention(q, k, v, windows, scale=scale, padding=seen)


class _Before(torch.autograd.Function):
    """x [n, ...] -> [count, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, layout: Layout) -> Tensor:
        ctx.count, ctx.layout, ctx.shape = count, layout, x.shape
        rank = layout.place.rank
        out = x.new_zeros((count, *x.shape[1:]))
        going, coming = parts_before(rank, count, layout)
        wanted = {other: out.new_empty((part.stop - part.start, *x.shape[1:])) for other, part in coming.items()}
        swap({other: x[part] for other, part in going.items()}, wanted, layout.place, x.device)
        for other, part in coming.items():
            out[part] = wanted[other]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layout = ctx.layout
        back = gradient.new_zeros(ctx.shape)
        coming, going = parts_before(layout.place.rank, ctx.count, layout)
        wanted = {other: back[part].clone() for other, part in coming.items()}
        swap({other: gradient[part] for other, part in going.items()}, wanted, layout.place, back.device)
        for other, part in coming.items():
            back[part] += wanted[other]
        return back, None, None


def parts_before(rank: int, count: int, layout: Layout) -> tuple[dict[int, slice], dict[int, slice]]:
    """By process: which of this one's tokens it needs, and where among the `count` rows before this one's those stand
    that it holds."""
    (first, end), going, coming = _span(rank, layout), dict[int, slice](), dict[int, slice]()
    if end == first:
        return going, coming
    for other in range(rank + 1, layout.place.size):
        begin, stop = _span(other, layout)
        if stop > begin and end <= begin - count:
            break
        if stop > begin:
            going[other] = slice(max(first, begin - count) - first, end - first)
    for other in range(rank - 1, -1, -1):
        begin, stop = _span(other, layout)
        if stop > begin and stop <= first - count:
            break
        if stop > begin:
            coming[other] = slice(max(begin, first - count) - first + count, stop - first + count)
    return going, dict(sorted(coming.items()))


def _span(rank: int, layout: Layout) -> tuple[int, int]:
    pieces = layout.pieces(rank)
    return (pieces[0].first, pieces[0].first + pieces[0].size) if pieces else (0, 0)
