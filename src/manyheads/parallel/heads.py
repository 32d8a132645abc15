"""Ulysses: for attention, every process has all tokens of some heads in place of some tokens of all heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.functional.precision import as_kernels_take
from manyheads.parallel.layout import Alone, Layout
from manyheads.parallel.ring import attend, check, numbered, ruled
from manyheads.parallel.wire import all_to_all


def heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool = False,
    window: int | None = None,
    padding: Tensor | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What `ring_attention` computes, from the same arguments, where the processes divide the key heads.

    One all-to-all for each of q, k and v makes [b, h, n, d] of this process's tokens into [b, h / P, N, d] of all, one
    makes the result that of its tokens again: a share of 1 - 1 / P of each tensor is sent once, where a ring sends k
    and v P - 1 times. A process then holds the whole length of its heads, and the layout does not matter to balance.
    Source: Jacobs et al., DeepSpeed Ulysses, arXiv:2309.14509.
    """
    name = "heads_attention"
    q, k, v = as_kernels_take(q, k, v)
    check(name, q, k, v, layout)
    size = layout.place.size
    if k.shape[1] % size:
        raise ValueError(
            f"{name}: {k.shape[1]} key heads were given to {size} processes; want a multiple, or ring_attention"
        )
    rule = ruled(name, q, scale, causal, window)
    read, shown = numbered(q, padding, documents)
    if read is not None and shown is not None:
        read, shown = layout.whole(read), layout.whole(shown)
    q, k, v = (_exchanged(x, layout, to_heads=True) for x in (q, k, v))
    out = attend(q, k, v, read, shown, Alone(layout.length, "contiguous"), rule)
    return _exchanged(out, layout, to_heads=False)


def _exchanged(x: Tensor, layout: Layout, *, to_heads: bool) -> Tensor:
    found: Tensor = _Exchange.apply(x, layout, to_heads)
    return found


class _Exchange(torch.autograd.Function):
    """Either way; the gradient goes the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, to_heads: bool) -> Tensor:
        ctx.layout, ctx.to_heads = layout, to_heads
        return _to_heads(x, layout) if to_heads else _to_tokens(x, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back = _to_tokens if ctx.to_heads else _to_heads
        return back(gradient, ctx.layout), None, None


def _to_heads(x: Tensor, layout: Layout) -> Tensor:
    """[b, h, n, d] of this process's tokens -> [b, h / P, N, d], in the order of the sequence."""
    at, (b, h, _, d) = layout.place, x.shape
    shapes = [(b, h // at.size, layout.count(rank), d) for rank in range(at.size)]
    parts = [part.flatten() for part in x.chunk(at.size, 1)]
    received = all_to_all(parts, [torch.Size(shape).numel() for shape in shapes], at)
    joined = torch.cat([part.view(shape) for part, shape in zip(received, shapes, strict=True)], 2)
    return joined.index_select(2, layout.order().to(x.device))


def _to_tokens(x: Tensor, layout: Layout) -> Tensor:
    """[b, h / P, N, d] -> [b, h, n, d] of this process's tokens."""
    at, (b, h, _, d) = layout.place, x.shape
    parts = [x.index_select(2, layout.index(rank).to(x.device)).flatten() for rank in range(at.size)]
    shape = (b, h, layout.count(), d)
    received = all_to_all(parts, [torch.Size(shape).numel()] * at.size, at)
    return torch.cat([part.view(shape) for part in received], 1)
