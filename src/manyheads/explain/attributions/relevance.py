"""Generic attention relevance (Chefer, Gur & Wolf 2021, arXiv 2103.15679): self, co- and encoder-decoder attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.base import Attributed, Attribution, Step, Trace, blocks, check_layer
from manyheads.explain.attributions.feed import Feed, Position, Target

# (stream that reads, stream that is read) -> relevance [b, n, m]
Relevances = dict[tuple[str, str], Tensor]


class Relevance(Attribution):
    """Abar = mean_h((dy/dA * A)^+), gathered through the layers; the answer is row p of the output stream's relevances.

    Self-attention of s:    R_ss += Abar R_ss,  R_sq += Abar R_sq.
    s reads q:              R_sq += Rn_ss^T Abar Rn_qq,  R_ss += Abar R_qs,  with Rn = (R - I) / rowsum + I.
    At first R_ss = I, R_sq = 0. Of one stream only a row is carried, from the top, in blocks of rows; several streams
    carry matrices [b, n, m]. An encoder-decoder is the case where R_qs stays 0. Two streams that read each other (one
    call after the other) use the relevances from before both.

    A row of R - I without relevance divides 0 by 0 in the released code; here it stays 0. That code also sets the class
    token's relevance to itself to 0 at the end, which the paper does not: here it is as the equations give it.
    normalise=False: R in the place of Rn. start_layer: layers before it are left out, counted in every stream from 0,
    or from its end where negative. The paper takes all of them; the released notebooks for CLIP take the last alone
    unless told otherwise, which is start_layer=-1.
    """

    of_target = True

    def __init__(self, model: nn.Module, *, normalise: bool = True, start_layer: int = 0, **shared: Any):
        super().__init__(model, **shared)
        if not isinstance(start_layer, int) or isinstance(start_layer, bool):
            raise ValueError(f"start_layer={start_layer!r}: give the number of a layer, from 0 on, or -1 for the last")
        self.normalise, self.start_layer = normalise, start_layer

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        trace = _from_layer(self.trace(feed, target, position, gradients=True), self.start_layer)
        start = trace.start(position)
        if all(step.reader == step.source for step in trace.steps):
            for step in reversed(trace.steps):
                if step.reader in start:
                    start[step.reader] = _row(step, start[step.reader])
            return trace.finish({stream: start[stream] for stream in trace.real})
        relevances = self._matrices(trace)
        found: dict[str, Tensor] = {}
        for (reader, source), matrix in relevances.items():
            if reader in start:
                own = (start[reader][:, None] @ matrix)[:, 0]
                found[source] = found[source] + own if source in found else own
        return trace.finish(found)

    def _matrices(self, trace: Trace) -> Relevances:
        found = initial({stream: real.shape for stream, real in trace.real.items()}, trace.dtype, trace.feed.device)
        for group in trace.groups:
            before, maps = dict(found), [(step, gathered(step.call)) for step in group]
            for step, abar in maps:
                found |= step_rule(before, step.reader, step.source, abar, self.normalise)
        return found


def _from_layer(trace: Trace, first: int) -> Trace:
    """Without the steps before this layer of their stream and kind. ValueError for a layer that there is not."""
    if first not in (0, -1):
        check_layer(trace, first)
    ways = Counter((step.reader, step.source) for step in trace.steps)
    for (reader, _), count in ways.items():
        if not -count <= first < count:
            raise ValueError(f"start_layer={first}: stream {reader} has layers 0 to {count - 1}")
    passed: Counter[tuple[str, str]] = Counter()
    groups: list[list[Step]] = []
    for group in trace.groups:
        groups.append([])
        for step in group:
            way = step.reader, step.source
            if passed[way] >= first % ways[way]:
                groups[-1].append(step)
            passed[way] += 1
    return replace(trace, groups=groups)


def initial(shapes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Relevances:
    """Identity for every stream on itself, zeros between streams. shapes: stream -> (b, n)."""
    found = {}
    for s, (b, n) in shapes.items():
        for q, (_, m) in shapes.items():
            matrix = torch.eye(n, m, dtype=dtype, device=device) * (s == q)
            found[s, q] = matrix.expand(b, n, m)
    return found


def step_rule(before: Relevances, s: str, q: str, abar: Tensor, normalise: bool = True) -> Relevances:
    """What changes when stream s reads stream q through abar [b, n, m]: s == q is self-attention."""
    if s == q:
        return {(s, other): before[s, other] + abar @ before[s, other] for reader, other in before if reader == s}
    own, others = before[s, s], before[q, q]
    if normalise:
        own, others = normalised(own), normalised(others)
    return {
        (s, q): before[s, q] + own.transpose(1, 2) @ abar @ others,
        (s, s): before[s, s] + abar @ before[q, s],
    }


def normalised(relevance: Tensor) -> Tensor:
    """(R - I) / rowsum(R - I) + I, with 0 / 0 = 0."""
    eye = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    gained = relevance - eye
    total = gained.sum(-1, keepdim=True)
    return torch.where(total == 0, torch.zeros_like(gained), gained / total.masked_fill(total == 0, 1)) + eye


def gathered(call: Any, rows: slice | None = None) -> Tensor:
    """Abar [b, rows, m], of all rows unless told otherwise."""
    if rows is None:
        return torch.cat([gathered(call, each) for each in blocks(call)], 1)
    weights = call.weights(None, rows).detach()
    found: Tensor = (weights * call.weight_gradients(None, rows)).clamp_min_(0).mean(1)
    return found


def _row(step: Step, row: Tensor) -> Tensor:
    """row (I + Abar), [b, n]."""
    found = row
    for rows in blocks(step.call, row):
        found = found + (row[:, None, rows] @ gathered(step.call, rows).to(row.dtype))[:, 0]
    return found
