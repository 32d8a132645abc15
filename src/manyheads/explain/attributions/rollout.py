"""Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    sum to one over both streams (the paper has no such models). fuse="max" and "min", from later code (vit-explain),
    are made to sum to one by row; that code divides columns instead, by a slip of broadcasting.
    discard_ratio, from there: of the n^2 numbers of a layer's A_l so large a share, the smallest, becomes zero before
    the residual comes to it; the first token's weight on itself stays (there it is called the class token). One such
    matrix is then held. In a batch only real tokens count (there only the first row of it is thinned out).
    """

    # Whether weights are multiplied by the gradients of the score.
    gradients = False

    def __init__(
        self,
        model: nn.Module,
        *,
        fuse: str = "mean",
        residual: float = 0.5,
        discard_ratio: float = 0.0,
        **shared: Any,
    ):
        super().__init__(model, **shared)
        check_fuse(fuse)
        check_residual(residual)
        check_discard(discard_ratio)
        self.fuse, self.residual, self.discard_ratio = fuse, residual, discard_ratio

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        whole = isinstance(position, str) and position == "all"
        trace = self.trace(feed, target, None if whole else position, gradients=self.gradients)
        if whole:
            return self._all(trace)
        shares = {stream: torch.zeros_like(real, dtype=trace.dtype) for stream, real in trace.real.items()}
        shares |= trace.start(position)
        for group in reversed(trace.groups):
            shares = self._back(group, shares, trace.real)
        return trace.finish(shares)

    def _fused(self, call: Any, rows: slice) -> Tensor:
        """A_l of these rows, [b, rows, m]."""
        return fused(call, rows, self.fuse)

    def _whole(self, step: Step, real: dict[str, Tensor]) -> Tensor:
        """A_l [b, n, m] without what is discarded."""
        weights = torch.cat([self._fused(step.call, rows) for rows in blocks(step.call)], 1)
        return thinned(weights, self.discard_ratio, real[step.reader], real[step.source], keep_first=not self.gradients)

    def _back(self, group: list[Step], shares: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shares of what leaves the group -> shares of what enters it."""
        readers = {step.reader for step in group}
        before = {stream: share for stream, share in shares.items() if stream not in readers}
        for step in group:
            kept, taken = self._split(step, shares[step.reader], real)
            for stream, part in ((step.reader, kept), (step.source, taken)):
                before[stream] = before[stream] + part if stream in before else part
        return before

    def _split(self, step: Step, share: Tensor, real: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What a row keeps by the residual [b, n], and what it takes from each key [b, m]."""
        call, r, kept = step.call, self.residual, torch.zeros_like(share)
        taken = share.new_zeros(share.shape[0], size(call)[1])
        whole = self._whole(step, real) if self.discard_ratio else None
        for rows in blocks(call, share):
            weights = (self._fused(call, rows) if whole is None else whole[:, rows]).to(share.dtype)
            part = share[:, rows] / _total(weights, r)
            kept[:, rows] = r * part
            taken += (1 - r) * (part[:, None] @ weights)[:, 0]
        return kept, taken

    def _all(self, trace: Trace) -> Tensor:
        if len(trace.real) > 1:
            raise ValueError(f"position='all' needs a model of one stream; this one has {sorted(trace.real)}")
        state: Tensor | None = None
        for step in trace.steps:
            if self.discard_ratio:
                whole = self._whole(step, trace.real)
                state = _product(whole, state, slice(0, whole.shape[1]), self.residual)
            else:
                state = layer_of(step.call, state, self._fused, self.residual)
        assert state is not None
        (stream, real) = next(iter(trace.real.items()))
        trace.finish({stream: state.sum(1)})
        return state.masked_fill(~(real[:, :, None] & real[:, None, :]), 0)


class GradientRollout(Rollout):
    """Rollout of A_l = (mean_h A_l^h * dy / dA_l^h)^+: of what speaks for the target, where attention carries it.

    Source: the code of vit-explain (no paper), whose discard_ratio of 0.9 is the default, the first token's weight on
    itself not spared. There the hooks collect gradients from the last layer to the first and meet the weights of the
    first to the last; here each layer's weights meet their own. A row still keeps r, and what is gathered is small
    beside that as gradients are: a token's own share is the largest.
    """

    of_target = True
    gradients = True

    def __init__(self, model: nn.Module, *, residual: float = 0.5, discard_ratio: float = 0.9, **shared: Any):
        super().__init__(model, fuse="mean", residual=residual, discard_ratio=discard_ratio, **shared)

    def _fused(self, call: Any, rows: slice) -> Tensor:
        found: Tensor = (call.weights(None, rows).detach() * call.weight_gradients(None, rows)).mean(1)
        return found.clamp_min_(0)


def rollout(
    weights: Iterable[Tensor], *, residual: float = 0.5, fuse: str = "mean", discard_ratio: float = 0.0
) -> Tensor:
    """Rollout of given weights, first layer first, each [b, n, n] or [b, h, n, n]: R [b, n, n]."""
    check_fuse(fuse)
    check_residual(residual)
    check_discard(discard_ratio)
    state: Tensor | None = None
    for given in weights:
        if given.dim() not in (3, 4) or given.shape[-1] != given.shape[-2]:
            raise ValueError(f"weights of a layer are {list(given.shape)}; rollout needs [b, n, n] or [b, h, n, n]")
        if given.dim() == 4:
            given = given.mean(1) if fuse == "mean" else given.amax(1) if fuse == "max" else given.amin(1)
        if discard_ratio:
            every = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
            given = thinned(given, discard_ratio, every, every, keep_first=True)
        state = _product(given, state, slice(0, given.shape[1]), residual)
    if state is None:
        raise ValueError("rollout of no layers: give at least one")
    return state


def thinned(weights: Tensor, ratio: float, rows: Tensor, keys: Tensor, *, keep_first: bool) -> Tensor:
    """weights [b, n, m] with zeros for the smallest `ratio` of their entries at real rows [b, n] and keys [b, m]; of
    equal ones those that come first. keep_first: not for the first real entry."""
    real = (rows[:, :, None] & keys[:, None, :]).flatten(1)
    flat = weights.flatten(1)
    order = flat.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)
    place = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    fewest = torch.tensor([int(count * ratio) for count in real.sum(1).tolist()], device=flat.device)
    gone = real & (rank < fewest[:, None])
    if keep_first:
        gone &= real.cumsum(1) != 1
    return flat.masked_fill(gone, 0).view_as(weights)


def layer_of(call: Any, state: Tensor | None, fuse: Callable[[Any, slice], Tensor], residual: float) -> Tensor:
    """A~ times the state [b, n, n], in blocks of rows; keys that no row of a block sees are left out of its product."""
    found: Tensor | None = None
    for rows in blocks(call):
        near = narrow(call, rows)
        weights = fuse(near, rows)
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


def check_discard(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"discard_ratio={ratio}: the share of weights that are left out is at least 0 and below 1")


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
