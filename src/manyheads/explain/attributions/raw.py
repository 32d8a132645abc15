"""Raw attention: one layer's weights, heads fused, in the row that is asked about."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manyheads.explain.attributions.base import Attributed, Attribution, Trace, blocks, check_fuse, check_layer, fused
from manyheads.explain.attributions.feed import Feed, Position, Target


class RawAttention(Attribution):
    """a_j = fuse_h A^h[p, j] of one layer, p the position. The baseline of Abnar & Zuidema (arXiv 2005.00928).

    layer: counted within every stream (-1: the last). Where a stream is read by another, it gets the weights of the
    layer's reading; the target does not enter, but is checked. Shapes: [b, n], or a dict of them by stream.
    """

    def __init__(self, model: nn.Module, *, layer: int = -1, fuse: str = "mean", **shared: Any):
        super().__init__(model, **shared)
        check_fuse(fuse)
        self.layer, self.fuse = layer, fuse

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        trace = self.trace(feed, target, position)
        check_layer(trace, self.layer)
        start = trace.start(position)
        found = {}
        for stream in trace.real:
            step = pick(trace, stream, self.layer)
            if step is not None:
                found[stream] = mixed(step.call, start[step.reader], self.fuse)
        return trace.finish(found)


def pick(trace: Trace, stream: str, layer: int) -> Any:
    """The step by which the output streams read this stream in a layer; None where none of them does."""
    for own in (True, False):
        steps = [
            step for step in trace.steps
            if step.source == stream and step.reader in trace.ends and (step.reader == stream) == own
        ]  # fmt: skip
        if not steps:
            continue
        if not -len(steps) <= layer < len(steps):
            raise ValueError(f"layer {layer}: stream {stream} has layers 0 to {len(steps) - 1}")
        return steps[layer]
    return None


def mixed(call: Any, start: Tensor, fuse: str) -> Tensor:
    """start [b, n] times the fused weights, [b, m], without a matrix [n, m]."""
    parts = []
    for rows in blocks(call, start):
        weights = fused(call, rows, fuse)
        parts.append((start[:, None, rows].to(weights.dtype) @ weights)[:, 0])
    return sum(parts[1:], start=parts[0])
