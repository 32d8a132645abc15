"""Ring attention: keys and values go round, queries stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.functional.linear import widen
from manyheads.functional.precision import as_kernels_take
from manyheads.parallel.blocks import Rule, Side, Slopes, Sums, slopes, tiles
from manyheads.parallel.layout import Layout
from manyheads.parallel.wire import Hop, Place

# Messages to one process are told apart by their numbers: keys and values, and beside them their gradients.
KEYS, GRADIENTS = 0, 8
# Bytes of keys and values that travel at once: heads go round in as many groups as this makes, so that what is under
# way is a small part of what a process holds.
UNDERWAY = 1 << 21


def ring_attention(
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
    """softmax(scale q k^T) v over a sequence of which every process holds its part by `layout`; [b, h, n, dv].

    q [b, h, n, d], k [b, g, n, d], v [b, g, n, dv] with h a multiple of g (keys are never expanded), n the tokens of
    this process; all processes call alike, backward included. In P - 1 hops every process meets the keys of all others
    and joins what it read by log-sum-exp, in float32 at least; the next keys travel while it computes with these. The
    backward pass lets keys go round once more with their gradients, one hop further to come home. Memory of a process:
    its own shard and a few others of that size, and one tile of scores, however long the sequence is.

    causal: token i sees j <= i in the order of the sequence; a zigzag layout then gives all processes the same work.
    window: i - j < window, causal only. padding [b, n], True = real: hides keys. documents [b, n], numbers from zero:
    tokens see their own document only. Rows that see nothing are zero. scale: 1 / sqrt(d) if None. Under autocast q, k
    and v are of its dtype, as torch's own kernel has it, and the sums stay as wide.
    Traffic: (P - 1) shards of k and v forward; backward the same and P shards of their gradients in float32 at least.
    Source: Liu et al., Ring Attention with Blockwise Transformers, arXiv:2310.01889. The released code joins by maximum
    and sum and has no zigzag, which is from the unofficial ring-flash-attention.
    """
    q, k, v = as_kernels_take(q, k, v)
    check("ring_attention", q, k, v, layout)
    read, shown = numbered(q, padding, documents)
    return attend(q, k, v, read, shown, layout, ruled("ring_attention", q, scale, causal, window))


def attend(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor | None, shown: Tensor | None, layout: Layout, rule: Rule
) -> Tensor:
    """The same with all that was asked for in the forms of `numbered` and `ruled`."""
    out: Tensor = _Ring.apply(q.unflatten(1, (k.shape[1], -1)), k, v, read, shown, layout, rule)
    return out.flatten(1, 2)


def ruled(name: str, q: Tensor, scale: float | None, causal: bool, window: int | None) -> Rule:
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"{name}: window={window}, causal={causal} was given; want window >= 1 and causal=True")
    return Rule(q.shape[-1] ** -0.5 if scale is None else scale, causal, window)


def check(name: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape[0] != b or v.shape[:3] != k.shape[:3] or m != n or k.shape[-1] != d or h % g:
        raise ValueError(
            f"{name}: {shapes} were given; want [b, h, n, d], [b, g, n, d], [b, g, n, dv], g a divisor of h"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise ValueError(f"{name}: q, k, v of {q.dtype}, {k.dtype}, {v.dtype} were given; want one dtype and device")
    layout.check(name, n)


def numbered(q: Tensor, padding: Tensor | None, documents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """[b, n] the document that each query reads, and that in which each key is shown: -1, none, where it is padding."""
    b, n = q.shape[0], q.shape[2]
    for name, given in (("padding", padding), ("documents", documents)):
        if given is not None and given.shape != (b, n):
            raise ValueError(f"parallel: {name} of shape {tuple(given.shape)} was given; want this shard's {(b, n)}")
    if padding is not None and padding.dtype != torch.bool:
        raise ValueError(f"parallel: padding of {padding.dtype} was given; want booleans, True = a real token")
    if documents is not None and (documents.is_floating_point() or (documents < 0).any()):
        raise ValueError("parallel: documents below zero or not whole were given; want integers from zero")
    if padding is None and documents is None:
        return None, None
    read = torch.zeros(b, n, dtype=torch.int32, device=q.device) if documents is None else documents.int()
    return read, read if padding is None else read.masked_fill(~padding, -1)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        read: Tensor | None,
        shown: Tensor | None,
        layout: Layout,
        rule: Rule,
    ) -> Tensor:
        sums, at = Sums(q, v.shape[-1]), layout.place
        queries = Side(layout.pieces(), read)
        for heads in _groups(k, v, layout):
            part, some = sums.of(heads), q[:, heads]
            for rank, (keys, values, theirs), hop in _round([k[:, heads], v[:, heads], shown], layout, at):
                parts = tiles(queries, Side(layout.pieces(rank), theirs), rule, q.device)
                part.add(some, keys, values, parts, rule.scale)
                hop()
        ctx.save_for_backward(q, k, v, read, shown, sums.out, sums.lse)
        ctx.layout, ctx.rule = layout, rule
        return sums.out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, read, shown, out, lse = ctx.saved_tensors
        layout, rule, at = ctx.layout, ctx.rule, ctx.layout.place
        gradient = widen(gradient)
        dots = (gradient * out).sum(-1)
        dq, dk, dv = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
        queries = Side(layout.pieces(), read)
        for heads in _groups(k, v, layout):
            known = Slopes(*(x[:, heads] for x in (q, gradient, lse, dots)))
            home, some = _Home(at), dq[:, heads]
            for rank, (keys, values, theirs), hop in _round([k[:, heads], v[:, heads], shown], layout, at):
                parts = tiles(queries, Side(layout.pieces(rank), theirs), rule, q.device)
                home.add(slopes(known, keys, values, parts, rule.scale, some), layout.count((rank - 1) % at.size))
                hop()
            dk[:, heads], dv[:, heads] = home.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _groups(k: Tensor, v: Tensor, layout: Layout) -> Iterator[slice]:
    """Key heads that go round together, the same in every process."""
    longest = -(-layout.length // layout.place.size)
    each = k.shape[0] * longest * (k.shape[-1] + v.shape[-1]) * k.element_size()
    step = max(1, UNDERWAY // max(1, each)) if layout.place.size > 1 else k.shape[1]
    for start in range(0, k.shape[1], step):
        yield slice(start, min(start + step, k.shape[1]))


def _round(own: list[Tensor | None], layout: Layout, at: Place) -> Any:
    """Every process's tensors in turn, with their rank and what waits for the next: they travel meanwhile."""
    here = own
    for step in range(at.size):
        rank = (at.rank - step) % at.size
        if step == at.size - 1:
            yield rank, here, _nothing
            return
        count = layout.count((rank - 1) % at.size)
        going = [x for x in here if x is not None]
        hop = Hop(going, [_sized(x, count) for x in going], at, tag=KEYS)
        yield rank, here, hop.wait
        coming = iter(hop.received)
        here = [None if x is None else next(coming) for x in here]


class _Home:
    """Gradients of keys and values, which follow these round the ring and go one hop further."""

    def __init__(self, at: Place) -> None:
        self._at = at
        self._hop: Hop | None = None
        self._own: list[Tensor] = []

    def add(self, found: tuple[Tensor, ...], following: int) -> None:
        """What this process adds to the gradients of the keys that are here, and how many tokens come next."""
        here = [mine + theirs for mine, theirs in zip(found, self._hop.wait(), strict=True)] if self._hop else [*found]
        if self._at.size == 1:
            self._own = here
        else:
            self._hop = Hop(here, [_sized(x, following) for x in here], self._at, tag=GRADIENTS)

    def wait(self) -> list[Tensor]:
        return self._own if self._hop is None else self._hop.wait()


def _sized(x: Tensor, count: int) -> Tensor:
    """Room for a tensor like x of another number of tokens: the axis before the last, or the last of [b, n]."""
    shape = (*x.shape[:-1], count) if x.ndim == 2 else (*x.shape[:-2], count, x.shape[-1])
    return x.new_empty(shape)


def _nothing() -> None:
    return None
