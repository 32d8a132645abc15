"""Attention flow (Abnar & Zuidema 2020, arXiv 2005.00928), by SciPy's maximum flow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.explain.attributions.base import BROKEN, Attributed, Attribution, Step, Trace, blocks, check_fuse, fused
from manyheads.explain.attributions.feed import Feed, Position, Target
from manyheads.explain.attributions.rollout import check_residual

# SciPy's capacities are 32-bit integers: shares are counted in millionths.
UNITS = 1_000_000


class Flow(Attribution):
    """The most that could flow from the output row to each input token, if weights were the capacities of pipes.

    A graph of (L + 1) n nodes, capacities A~_l = ((1 - r) A_l + r I) / rowsum from layer l's rows to layer l - 1's; for
    each input token j its own maximum flow, [b, n]. position="mean" lets 1/n enter at every real row.

    Capacities are rounded to the nearest millionth (SciPy's are int32) and smaller ones are dropped; a flow is then off
    by at most 5e-7 times the edges of its smallest cut. One maximum flow per input token over L n^2 edges: for some
    hundred tokens. normalise: rows that sum to one, as the released code gives; the paper's flows are not divided.
    Encoder-decoder models as for Rollout.
    """

    def __init__(
        self, model: nn.Module, *, fuse: str = "mean", residual: float = 0.5, normalise: bool = False, **shared: Any
    ):
        super().__init__(model, **shared)
        check_fuse(fuse)
        check_residual(residual)
        self.fuse, self.residual, self.normalise = fuse, residual, normalise

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        trace = self.trace(feed, target, position)
        found = {stream: torch.zeros_like(real, dtype=trace.dtype) for stream, real in trace.real.items()}
        start = trace.start(position)
        for row in range(feed.rows):
            graph = _Graph(trace, row, self.fuse, self.residual)
            for end, share in start.items():
                for stream, flows in graph.flows(end, share[row]).items():
                    found[stream][row] += flows.to(found[stream])
        if self.normalise:
            total = sum(each.sum(-1, keepdim=True) for each in found.values())
            found = {stream: each / total for stream, each in found.items()}
        return trace.finish(found)


class _Graph:
    """Edges of one row of the batch, from the output's nodes down to the input's. Node 0 is where the flow enters."""

    def __init__(self, trace: Trace, row: int, fuse: str, residual: float):
        self.real = {stream: real[row].cpu().numpy() for stream, real in trace.real.items()}
        self.heads: list[np.ndarray] = []
        self.tails: list[np.ndarray] = []
        self.caps: list[np.ndarray] = []
        self.nodes = 1
        self.inputs = {stream: self._level(stream) for stream in self.real}
        self.tops = dict(self.inputs)
        for group in trace.groups:
            below = dict(self.tops)
            self.tops |= {step.reader: self._level(step.reader) for step in group}
            for step in group:
                self._connect(step, below, _matrix(step, row, fuse), residual)

    def _level(self, stream: str) -> int:
        first, self.nodes = self.nodes, self.nodes + len(self.real[stream])
        return first

    def _connect(self, step: Step, below: dict[str, int], weights: np.ndarray, residual: float) -> None:
        total = np.maximum((1 - residual) * weights.sum(-1, keepdims=True) + residual, np.finfo(np.float64).tiny)
        taken, kept = (1 - residual) * weights / total, residual / total[:, 0]
        if step.reader == step.source:
            taken[np.arange(len(kept)), np.arange(len(kept))] += kept
        else:
            rows = np.arange(len(kept))
            self._edges(self.tops[step.reader] + rows, below[step.reader] + rows, kept)
        i, j = np.nonzero(taken)
        self._edges(self.tops[step.reader] + i, below[step.source] + j, taken[i, j])

    def _edges(self, heads: np.ndarray, tails: np.ndarray, shares: np.ndarray) -> None:
        caps = np.rint(shares * UNITS).astype(np.int32)
        keep = caps > 0
        self.heads.append(heads[keep])
        self.tails.append(tails[keep])
        self.caps.append(caps[keep])

    def flows(self, end: str, share: Tensor) -> dict[str, Tensor]:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow

        enter = np.rint(share.double().cpu().numpy() * UNITS).astype(np.int32)
        rows = np.nonzero(enter)[0]
        heads = np.concatenate([*self.heads, np.zeros(len(rows), dtype=np.int64)])
        tails = np.concatenate([*self.tails, self.tops[end] + rows])
        caps = np.concatenate([*self.caps, enter[rows]])
        graph = csr_array((caps, (heads, tails)), shape=(self.nodes, self.nodes), dtype=np.int32)
        found = {}
        for stream, first in self.inputs.items():
            flows = [
                maximum_flow(graph, 0, first + j).flow_value / UNITS if real else 0.0
                for j, real in enumerate(self.real[stream])
            ]
            found[stream] = torch.tensor(flows, dtype=torch.float64)
        return found


def _matrix(step: Step, row: int, fuse: str) -> np.ndarray:
    found = np.concatenate([fused(step.call, rows, fuse)[row].double().cpu().numpy() for rows in blocks(step.call)])
    if not np.isfinite(found).all():  # no number, no integer capacity
        raise ValueError(f"attention of {step.call.site.path} holds NaN or infinity: {BROKEN}")
    return found
