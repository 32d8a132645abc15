"""What interventions share: which heads they change, spans, and changing a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import opened
from manyheads.hosts.sites import choose, only_stack, text_stack
from manyheads.hosts.taps import AttentionCall, tap

# (layer, query head) pairs, as detectors name them.
Heads = Sequence[tuple[int, int]]


def heads_by_layer(model: nn.Module, heads: Heads | None, stack: str) -> dict[int, list[int] | None]:
    """layer of the stack -> its heads; None for all heads of a layer. heads None: everything."""
    if heads is None:
        return {site.layer: None for site in choose(model, None, stack, "self")}
    chosen: dict[int, list[int] | None] = {}
    for layer, head in heads:
        own = chosen.setdefault(int(layer), [])
        assert own is not None
        own.append(int(head))
    if not chosen:
        raise ValueError("heads is empty: give (layer, head) pairs, or None for all heads")
    return chosen


def positions(span: Sequence[int] | slice, length: int) -> list[int]:
    """Places of tokens that are there; a span may end beyond them, as while decoding."""
    if isinstance(span, slice):
        return list(range(*span.indices(length)))
    wrong = [place for place in span if place < 0]
    if wrong:
        raise ValueError(f"a span names places from 0; got {wrong}")
    return [int(place) for place in span if place < length]


@contextmanager
def changed(
    model: nn.Module,
    heads: Heads | None,
    change: Callable[[AttentionCall, list[int] | None], Tensor | None],
    stack: str | None,
    of_text: bool = False,
) -> Iterator[None]:
    """change(call, heads of this layer) -> the output in the place of the call's, or None; self attention of one stack
    only. Where a model has several, one must be said; of_text: or it is the one that reads text."""
    where = text_stack(model, stack) if of_text else only_stack(model, stack)
    chosen = heads_by_layer(model, heads, where)

    def reader(call: Any) -> Tensor | None:
        return change(opened(call, "an intervention"), chosen[call.layer])

    with tap(model, reader, layers=sorted(chosen), stack=where, kind="self"):
        yield


_MOVES = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


def companions(past: Any, make: Callable[[], list[Any]]) -> list[Any]:
    """The caches of a call's other runs, which belong to the one given: made when it is first seen, and from then on
    reordered, cropped and reset with it."""
    if not hasattr(past, "manyheads_companions"):
        others = make()
        for name in _MOVES:
            setattr(past, name, _for_all([getattr(cache, name) for cache in (past, *others)]))
        past.manyheads_companions = others
    found: list[Any] = past.manyheads_companions
    return found


def _for_all(calls: list[Callable[..., Any]]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        first, *_others = (call(*args, **kwargs) for call in calls)
        return first

    return run


def normalised(weights: Tensor) -> Tensor:
    """Rows that sum to 1; a row that sees nothing stays zero."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def check_share(name: str, value: float, most: float = 1.0) -> float:
    if not 0 <= value <= most:
        raise ValueError(f"{name} must lie between 0 and {most:g}; got {value}")
    return float(value)
