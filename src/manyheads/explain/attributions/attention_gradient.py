"""Attention times its gradient: what the score would lose, to first order, if nobody attended to a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from manyheads.explain.attributions.base import Attributed, Attribution, blocks, check_layer
from manyheads.explain.attributions.feed import Feed, Position, Target


class AttentionGradient(Attribution):
    """a_j = sum over layers, heads and rows of A^h[i, j] * dy / dA^h[i, j], signed.

    It is the derivative of the score by a factor on column j of all weights (rows not made to sum to one again). The
    product is Serrano & Smith's (arXiv 1906.03731, one attention layer over a recurrent encoder); summing over layers,
    heads and rows is what a transformer asks for, since every row carries on to the score. layers: which of each stream
    (all). Keys of a cross layer belong to the stream that is read. No matrix [n, n] is kept: rows come in blocks.
    Shapes: [b, n], or a dict of them by stream.
    """

    of_target = True

    def __init__(self, model: nn.Module, *, layers: Sequence[int] | None = None, **shared: Any):
        super().__init__(model, **shared)
        self.layers = None if layers is None else list(layers)

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        trace = self.trace(feed, target, position, gradients=True)
        found = {stream: torch.zeros_like(real, dtype=trace.dtype) for stream, real in trace.real.items()}
        deepest = max(step.call.layer for step in trace.steps)
        if self.layers is not None and not all(0 <= layer <= deepest for layer in self.layers):
            raise ValueError(f"layers={self.layers}: the model has layers 0 to {deepest}")
        for layer in self.layers or ():
            check_layer(trace, layer)
        for step in trace.steps:
            if self.layers is not None and step.call.layer not in self.layers:
                continue
            for rows in blocks(step.call):
                weights = step.call.weights(None, rows).detach()
                product = weights * step.call.weight_gradients(None, rows)
                found[step.source] += product.sum((1, 2))
        return trace.finish(found)
