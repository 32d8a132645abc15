"""Norm of the weighted, transformed value vectors (Kobayashi et al. 2020, arXiv 2004.10102)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.base import Attributed, Attribution, blocks, check_layer
from manyheads.explain.attributions.feed import Feed, Position, Target
from manyheads.explain.attributions.raw import pick
from manyheads.explain.attributions.writes import Write, writes, written
from manyheads.hosts.calls import opened


class ValueNorm(Attribution):
    """a_j = || sum_h A^h[p, j] f^h(x_j) ||, f^h(x) = (x W_v^h + b_v^h) W_o^h: what token j adds in one layer.

    A token that is looked at but whose values are small (a sink) counts little. heads="sum" adds the heads' vectors
    before the norm, as the paper does for a layer; "mean" is the mean of the heads' own norms. layer: counted within
    every stream, -1 the last. The output projection's bias belongs to no token. Computed for all rows that are asked
    for from the Gram matrix of a key's h vectors, so no [n, m, out] is made. Shapes: [b, n], or a dict by stream.
    """

    def __init__(self, model: nn.Module, *, layer: int = -1, heads: str = "sum", **shared: Any):
        super().__init__(model, **shared)
        if heads not in ("sum", "mean"):
            raise ValueError(f"heads={heads!r}: the heads' vectors are added ('sum') or their norms averaged ('mean')")
        self.layer, self.heads = layer, heads

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        found_writes: dict[int, Write] = {}

        def watch(calls: list[Any]) -> Any:
            return writes(self.model, calls, found_writes)

        trace = self.trace(feed, target, position, watch=watch)
        check_layer(trace, self.layer)
        start, order = trace.start(position), [step.call for step in trace.steps]
        found = {}
        for stream in trace.real:
            step = pick(trace, stream, self.layer)
            if step is None:
                continue
            index = next(i for i, call in enumerate(order) if call is step.call)
            opened(step.call, "value norm").check_values()
            if index not in found_writes:
                raise ValueError(f"{step.call.site.name}: no linear map reads the heads' outputs as they are")
            vectors = written(step.call, found_writes[index]).to(trace.dtype)
            found[stream] = _norms(step.call, vectors, start[step.reader], self.heads)
        return trace.finish(found)


def _norms(call: Any, vectors: Tensor, start: Tensor, heads: str) -> Tensor:
    """[b, m] from vectors [b, h, m, out]: the rows' norms, averaged by start [b, n]."""
    gram = torch.einsum("bhmo,bgmo->bmhg", vectors, vectors) if heads == "sum" else vectors.norm(dim=-1)
    found = torch.zeros(start.shape[0], vectors.shape[2], dtype=start.dtype, device=start.device)
    for rows in blocks(call, start):
        weights = call.weights(None, rows).to(start.dtype)
        if heads == "sum":
            norms = torch.einsum("bhrm,bmhg,bgrm->brm", weights, gram, weights).clamp_min(0).sqrt()
        else:
            norms = torch.einsum("bhrm,bhm->brm", weights, gram) / weights.shape[1]
        found += (start[:, None, rows] @ norms)[:, 0]
    return found
