"""FocusICL: many demonstrations that do not drown the question."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import tap
from manyheads.steer.common import Span, behind, check_share, inside_call
from manyheads.steer.method import Prompt, steering


@contextmanager
def focus_icl(
    model: nn.Module, demonstrations: Span, batches: int = 1, *, dropped: float = 0.0, stack: str | None = None
) -> Iterator[None]:
    """Claim: with more demonstrations a query attends less to itself, so that answers stop improving; demonstrations in
    batches, each seen with the query, keep its weight, and what is trivial among them is not looked at.

    Rows behind the demonstrations: merging T batches, each attended together with the query's own tokens, by their
    softmax mass counts the query T times: the scores of all keys that are no demonstration get log T. Of the
    demonstrations' tokens the `dropped` share with the least attention from the row (mean over heads) is hidden from
    it. batches 1 and dropped 0 change nothing. demonstrations: places, or [b, n] bool.
    Source: arXiv 2408.13987; no code was found. This is the one pass that its batches come to where they share
    positions and states; batches that do not see each other, each at the first positions, are not done here, and how
    its hyper-parameters are searched neither.
    """
    if batches < 1:
        raise ValueError(f"focus_icl: batches must be at least 1; got {batches}")
    check_share("focus_icl: dropped", dropped)

    def reader(call: Any) -> Tensor | None:
        return _read(opened(call, "focus_icl"), demonstrations, math.log(batches), dropped)

    if batches == 1 and dropped == 0:
        yield
        return
    with tap(model, reader, stack=text_stack(model, stack), kind="self"):
        yield


def _read(call: AttentionCall, demonstrations: Span, more: float, dropped: float) -> Tensor | None:
    n = call.query.shape[2]
    shown = inside_call(demonstrations, call, "focus_icl")
    late = behind(shown, n)
    if not bool(late.any()):
        return None
    first = int(late.any(0).long().argmax())

    def edit(weights: Tensor, rows: slice) -> Tensor:
        raised = weights * torch.where(shown, 1.0, math.exp(more))[:, None, None].to(weights)
        if dropped:
            raised = raised.masked_fill(_trivial(weights, shown, dropped), 0)
        total = raised.sum(-1, keepdim=True)
        new = raised * weights.sum(-1, keepdim=True) / total.clamp_min(torch.finfo(weights.dtype).tiny)
        return torch.where(late[:, None, rows, None] & (total > 0), new, weights)

    return call.mix(edit, rows=slice(first, n))


def _trivial(weights: Tensor, shown: Tensor, dropped: float) -> Tensor:
    """[b, 1, rows, m] bool: the demonstrations' tokens with the least attention in each row."""
    held = weights.mean(1, keepdim=True).masked_fill(~shown[:, None, None], torch.inf)
    counts = (shown.sum(-1) * dropped).long()[:, None, None, None]
    ranks = held.argsort(-1).argsort(-1)
    return ranks < counts


@steering(
    "focus_icl",
    title="many demonstrations that do not drown the question",
    source="arXiv 2408.13987",
    kinds=("language",),
    neutral={"batches": 1, "dropped": 0.0},
    strength="batches",
    reach=(1, 4),
)
def _open(
    model: Any, prompt: Prompt, *, span: str = "text", batches: int = 2, dropped: float = 0.0
) -> AbstractContextManager[None]:
    """span: the demonstrations."""
    places: Sequence[int] = prompt.places(span)
    return focus_icl(model, places, batches, dropped=dropped)
