"""Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.base import Attributed, Attribution, Step, Trace, blocks, check_fuse, fused, size
from manyheads.explain.attributions.feed import Feed, Position, Target
from manyheads.hosts.taps import AttentionCall


class Rollout(Attribution):
    """How much of each input token reaches the output row, if weights are shares and the residual keeps half.

    A~_l = ((1 - r) A_l + r I) / rowsum, A_l = fuse_h A_l^h, r = residual; R = A~_L ... A~_1; the answer is row p of R.
    With fuse="mean" and r = 1/2 that is 0.5 A + 0.5 I. One row goes through the layers from the top as a vector, in
    blocks of rows: no matrix [n, n] is made. position="all" gives R itself, [b, n, n], with two such matrices at once.

    Encoder-decoder: a cross layer keeps r of the decoder's row and takes 1 - r from the encoder's, so all shares still
    sum to one over both streams (the paper has no such models). fuse="max" and "min", from later code, are made to sum
    to one by row; popular code divides columns instead, by a slip of broadcasting.
    """

    def __init__(self, model: nn.Module, *, fuse: str = "mean", residual: float = 0.5, **shared: Any):
        super().__init__(model, **shared)
        check_fuse(fuse)
        check_residual(residual)
        self.fuse, self.residual = fuse, residual

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        whole = isinstance(position, str) and position == "all"
        trace = self.trace(feed, target, None if whole else position)
        if whole:
            return self._all(trace)
        shares = {stream: torch.zeros_like(real, dtype=trace.dtype) for stream, real in trace.real.items()}
        shares |= trace.start(position)
        for group in reversed(trace.groups):
            shares = self._back(group, shares)
        return trace.finish(shares)

    def _back(self, group: list[Step], shares: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shares of what leaves the group -> shares of what enters it."""
        readers = {step.reader for step in group}
        before = {stream: share for stream, share in shares.items() if stream not in readers}
        for step in group:
            kept, taken = self._split(step.call, shares[step.reader])
            for stream, part in ((step.reader, kept), (step.source, taken)):
                before[stream] = before[stream] + part if stream in before else part
        return before

    def _split(self, call: Any, share: Tensor) -> tuple[Tensor, Tensor]:
        """What a row keeps by the residual [b, n], and what it takes from each key [b, m]."""
        r, kept = self.residual, torch.zeros_like(share)
        taken = share.new_zeros(share.shape[0], size(call)[1])
        for rows in blocks(call, share):
            weights = fused(call, rows, self.fuse).to(share.dtype)
            part = share[:, rows] / _total(weights, r)
            kept[:, rows] = r * part
            taken += (1 - r) * (part[:, None] @ weights)[:, 0]
        return kept, taken

    def _all(self, trace: Trace) -> Tensor:
        if len(trace.real) > 1:
            raise ValueError(f"position='all' needs a model of one stream; this one has {sorted(trace.real)}")
        state: Tensor | None = None
        for step in trace.steps:
            state = layer_of(step.call, state, self.fuse, self.residual)
        assert state is not None
        (stream, real) = next(iter(trace.real.items()))
        trace.finish({stream: state.sum(1)})
        return state.masked_fill(~(real[:, :, None] & real[:, None, :]), 0)


def rollout(weights: Iterable[Tensor], *, residual: float = 0.5, fuse: str = "mean") -> Tensor:
    """Rollout of given weights, first layer first, each [b, n, n] or [b, h, n, n]: R [b, n, n]."""
    check_fuse(fuse)
    check_residual(residual)
    state: Tensor | None = None
    for given in weights:
        if given.dim() not in (3, 4) or given.shape[-1] != given.shape[-2]:
            raise ValueError(f"weights of a layer are {list(given.shape)}; rollout needs [b, n, n] or [b, h, n, n]")
        if given.dim() == 4:
            given = given.mean(1) if fuse == "mean" else given.amax(1) if fuse == "max" else given.amin(1)
        state = _product(given, state, slice(0, given.shape[1]), residual)
    if state is None:
        raise ValueError("rollout of no layers: give at least one")
    return state


def layer_of(call: Any, state: Tensor | None, fuse: str, residual: float) -> Tensor:
    """A~ times the state [b, n, n], in blocks of rows; keys that no row of a block sees are left out of its product."""
    found: Tensor | None = None
    for rows in blocks(call):
        near = narrow(call, rows)
        weights = fused(near, rows, fuse)
        if found is None:
            n = call.query.shape[2] if isinstance(call, AttentionCall) else weights.shape[2]
            found = weights.new_zeros(weights.shape[0], n, n)
        m = weights.shape[2]
        found[:, rows, :m] = _product(weights, None if state is None else state[:, :m, :m], rows, residual)
    assert found is not None
    return found


def narrow(call: Any, rows: slice) -> Any:
    """The call with only the keys up to the last that these rows may see, and at least up to themselves."""
    if not isinstance(call, AttentionCall) or (call.mask is not None and call.mask.dtype != torch.bool):
        return call
    stop = rows.stop
    if call.mask is not None:
        seen = call.mask[:, :, rows].any(0).any(0).any(0).nonzero()
        stop = max(stop, int(seen[-1]) + 1 if seen.numel() else 0)
    elif not call.causal:
        return call
    return call if stop >= call.key.shape[2] else call.narrowed(stop)


def check_residual(residual: float) -> None:
    if not 0 <= residual < 1:
        raise ValueError(f"residual={residual}: the share that a token keeps is at least 0 and below 1")


def _total(weights: Tensor, residual: float) -> Tensor:
    """Row sums of (1 - r) A + r I. They are one but for sinks, fused heads and rows that see nothing."""
    return ((1 - residual) * weights.sum(-1) + residual).clamp_min(torch.finfo(weights.dtype).tiny)


def _product(weights: Tensor, state: Tensor | None, rows: slice, residual: float) -> Tensor:
    """Rows of A~ times the state, whose absence is the identity."""
    total = _total(weights, residual)[:, :, None]
    if state is None:
        found = weights * (1 - residual)
        found.diagonal(rows.start, -2, -1).add_(residual)
        return found.div_(total)
    return torch.baddbmm(state[:, rows], weights, state, beta=residual, alpha=1 - residual).div_(total)
