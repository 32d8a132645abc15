"""One pass per sample for all measures: each sees every attention call, and its weights in blocks of rows.

Legend: h query heads, n queries, m keys. A block of weights is [1, h, rows, m], where keys that come after all of its
queries are left out of m if the layer does not see ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manyheads.explain.attributions.base import blocks
from manyheads.explain.detectors.subject import Sample, Subject
from manyheads.hosts.device import evaluating
from manyheads.hosts.taps import AttentionCall, tap


class Measure:
    """Something that is read while a model runs. scores(): name -> [layers, heads]."""

    needs_weights = True

    def call(self, call: Any, sample: Sample) -> None:
        """Once per attention call, before its weights."""

    def block(self, call: Any, weights: Tensor, rows: slice, sample: Sample) -> None:
        """Weights [1, h, rows, m] of these rows."""

    def done(self, call: Any, sample: Sample) -> None:
        """Once per attention call, after its weights."""

    @contextmanager
    def watching(self, subject: Subject) -> Iterator[None]:
        """Hooks beside the taps."""
        yield

    def scores(self) -> dict[str, Tensor]:
        raise NotImplementedError


def read(subject: Subject, plan: Iterable[tuple[Sample, Sequence[Measure]]]) -> None:
    """Runs the samples one by one, each for its measures; no matrix [n, m] outlives its layer."""
    plan = list(plan)
    every = list(dict.fromkeys(measure for _, measures in plan for measure in measures))
    with torch.no_grad(), evaluating(subject.model), ExitStack() as stack:
        for measure in every:
            stack.enter_context(measure.watching(subject))
        for sample, measures in plan:
            with tap(subject.model, partial(_look, sample, measures), stack=subject.stack, kind="self"):
                subject.feed(sample.named)


def _look(sample: Sample, measures: Sequence[Measure], call: Any) -> None:
    weighed = [measure for measure in measures if measure.needs_weights]
    for measure in measures:
        measure.call(call, sample)
    for rows in row_blocks(call) if weighed else ():
        weights = shares(call, rows)
        for measure in weighed:
            measure.block(call, weights, rows, sample)
    for measure in measures:
        measure.done(call, sample)


def row_blocks(call: Any) -> list[slice]:
    if not isinstance(call, AttentionCall):
        n, m = call.weights().shape[-2:]
        if n != m:
            raise ValueError(
                f"{call.site.path} has {n} queries for {m} keys: detectors read tokens that attend to each other"
            )
    return blocks(call)


def shares(call: Any, rows: slice, heads: Sequence[int] | None = None) -> Tensor:
    """Weights of a block that sum to at most one in every row. What a mechanism's effective weights are, of either
    sign, counts by its size."""
    weights: Tensor = _up_to(call, rows.stop).weights(heads, rows)
    # A row that has NaN anywhere is NaN everywhere, since its entries share a sum.
    if bool(weights[..., 0].isnan().any()):
        raise ValueError(f"attention of {call.site.path} holds NaN: the model's weights or its dtype are broken")
    if call.shares:
        return weights
    sizes = weights.abs()
    return sizes / sizes.sum(-1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)


def _up_to(call: Any, stop: int) -> Any:
    """The call with the keys that its first `stop` queries can see."""
    if not isinstance(call, AttentionCall) or not call.causal or call.mask is not None:
        return call
    return call.narrowed(stop)


class Rows:
    """[layers, heads] gathered by layer, with the mean over what was added (NaN: nothing was)."""

    def __init__(self) -> None:
        self.kept: dict[int, list[Tensor]] = {}

    def add(self, layer: int, values: Tensor) -> None:
        self.kept.setdefault(layer, []).append(values.double().cpu())

    def stacked(self) -> dict[int, Tensor]:
        """layer -> [samples, heads]"""
        return {layer: torch.stack(self.kept[layer]) for layer in sorted(self.kept)}

    def mean(self) -> Tensor:
        return even([found.nanmean(0) for found in self.stacked().values()])

    def spread(self) -> Tensor:
        """The greatest less the smallest over samples."""
        return even([found.amax(0) - found.amin(0) for found in self.stacked().values()])


def even(rows: Sequence[Tensor]) -> Tensor:
    """Rows of heads as [layers, heads]; NaN where a layer has fewer."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=torch.nan)
