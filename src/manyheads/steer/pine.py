"""PINE: documents that count the same wherever they stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.attend import probabilities
from manyheads.hosts.calls import opened
from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import AttentionCall, tap
from manyheads.steer.method import Prompt, steering


@contextmanager
def position_invariant(model: Any, documents: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Claim: answers depend on the order of documents through the causal mask and the positions; without both in the
    region of the documents, they do not.

    documents: (start, end) of each, one after the other without gaps. Documents see each other whole (each itself up to
    the query). For a query, documents are ranked by the attention it pays them without positions, softmax(q k / sqrt d)
    over the region, summed over a document's keys and divided by its length, and for a query in a document (whose own
    keys are left out, and who comes last) summed over that document's queries. The more a document counts the nearer it
    stands: the region's positions are given out anew in ascending order, per layer, head and query. Then the order of
    the documents changes nothing but for ties. With fewer than two documents nothing changes.
    Source: arXiv 2407.01100, wzq016/PINE `LlamaAttentionWithPS`. There keys are rotated anew for every query document;
    here the queries are, once per document, which gives the same distances. One row, no padding; full attention.
    """
    spans = _checked(documents)
    if len(spans) < 2:
        yield
        return
    from manyheads.hosts.families import rotations

    angles, where = rotations(model), text_stack(model)

    def reader(call: Any) -> Tensor:
        angle = angles[call.layer]
        if angle is None:
            raise ValueError(f"{call.site.path} has no rotary positions; every layer needs them")
        return _attend(opened(call, "position_invariant"), spans, angle)

    with tap(model, reader, stack=where, kind="self"):
        yield


def _checked(documents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    spans = sorted((int(start), int(end)) for start, end in documents)
    if any(start < 0 or end <= start for start, end in spans):
        raise ValueError(f"documents must be (start, end) with 0 <= start < end; got {list(documents)}")
    if any(a[1] != b[0] for a, b in pairwise(spans)):
        raise ValueError(f"documents must stand one after the other without gaps; got {list(documents)}")
    return spans


def _hides(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    return bool((mask != 0).any()) if mask.is_floating_point() else not bool(mask.all())


def _attend(call: AttentionCall, spans: list[tuple[int, int]], angle: Tensor) -> Tensor:
    b, h, n, _ = call.query.shape
    m = call.key.shape[2]
    if b != 1 or not (call.causal or n == 1) or _hides(call.mask):
        raise ValueError("position_invariant: one row without padding and without a window, please")
    if spans[-1][1] > m:
        raise ValueError(f"documents end at {spans[-1][1]}, the text at {m}: feed the whole region in the first pass")
    if n > 1 and n != m:
        raise ValueError("position_invariant: feed the text in one pass, then single tokens")
    first = m - n
    heads = torch.arange(h, device=call.query.device)
    keys, values = call.of_heads(call.key, heads), call.of_heads(call.value, heads)
    places = torch.arange(m, device=keys.device)
    plain = _turn(call.query, -places[first:], angle), _turn(keys, -places, angle)
    out = []
    # Documents' own queries share one ranking, later ones have one each; earlier ones see nothing of the region.
    cuts = [0, *sorted({edge for span in spans for edge in span}), m]
    for start, stop in pairwise(cuts):
        low, high = max(start, first), stop
        if low < high:
            own = next((i for i, span in enumerate(spans) if span == (start, stop)), None)
            out.append(_rows(call, spans, angle, plain, keys, values, slice(low - first, high - first), own))
    return torch.cat(out, 2)


def _rows(
    call: AttentionCall,
    spans: list[tuple[int, int]],
    angle: Tensor,
    plain: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    rows: slice,
    own: int | None,
) -> Tensor:
    """Output [1, h, rows, e] of queries that lie before, after or all in one of the documents."""
    query, n = call.query[:, :, rows], rows.stop - rows.start
    m = keys.shape[2]
    first = m - call.query.shape[2] + rows.start
    places = torch.arange(m, device=keys.device)
    seen = (places[None] <= torch.arange(first, first + n, device=keys.device)[:, None])[None, None]
    region = (spans[0][0], spans[-1][1])
    if first < region[0]:
        return probabilities(query.unsqueeze(2), keys, call.scoring, seen).flatten(1, 2).to(values.dtype) @ values
    shifts = _shifts(plain[0][:, :, rows], plain[1], call.scale, spans, own)
    # What stands before the region is as far from a document's query as from one in the last document.
    ahead = 0 if own is None else region[1] - spans[own][1]
    moved = _turn(query, torch.full((n,), ahead), angle) if ahead else query
    scores = (moved @ keys.transpose(2, 3)).float() * call.scale
    for i, (start, end) in enumerate(spans):
        moved = _turn(query, shifts[..., i], angle)
        scores[..., start:end] = (moved @ keys[:, :, start:end].transpose(2, 3)).float() * call.scale
        if own is not None and i != own:
            seen = seen | ((places >= start) & (places < end))[None, None, None]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(values.dtype) @ values


def _shifts(query: Tensor, keys: Tensor, scale: float, spans: list[tuple[int, int]], own: int | None) -> Tensor:
    """[1, h, rows, documents]: by how much a query is moved on, to stand at its new distance from each document."""
    begin, end = spans[0][0], spans[-1][1]
    scores = (query @ keys[:, :, begin:end].transpose(2, 3)).float() * scale
    if own is not None:
        scores[..., spans[own][0] - begin : spans[own][1] - begin] = -torch.inf
    weights = scores.softmax(-1)
    worth = torch.stack([weights[..., s - begin : e - begin].sum(-1) / (e - s) for s, e in spans], -1)
    if own is not None:
        worth = worth.sum(2, keepdim=True).expand_as(worth).clone()
        worth[..., own] = torch.inf
    order = worth.argsort(dim=-1, stable=True)
    lengths = torch.tensor([e - s for s, e in spans], device=keys.device)
    sorted_lengths = lengths.expand_as(order).gather(-1, order)
    starts = torch.empty_like(order).scatter_(-1, order, begin + sorted_lengths.cumsum(-1) - sorted_lengths)
    moved = starts - torch.tensor([s for s, _ in spans], device=keys.device)
    return -moved if own is None else moved[..., [own]] - moved


def _turn(rows: Tensor, by: Tensor, angle: Tensor) -> Tensor:
    """Rows [..., n, d] moved on by so many positions [n] or [..., n]."""
    from manyheads.functional.rotary import turn

    return turn(rows, by.to(rows.device).double(), angle.to(rows.device))


@steering(
    "position_invariant",
    title="documents that count the same wherever they stand",
    source="arXiv 2407.01100",
    kinds=("language",),
    neutral={"among": ""},
    strength=None,
)
def _open(model: Any, prompt: Prompt, *, among: str = "text") -> AbstractContextManager[None]:
    """The marks of the prompt are its documents; what stands between two of them goes with the first."""
    if among not in ("text", ""):
        raise ValueError(f"position_invariant: among={among!r}; want text (the marked documents), or nothing for none")
    marks = sorted(prompt.marked()) if among else []
    if among and len(marks) < 2:
        raise ValueError(f"position_invariant: {len(marks)} documents are marked; mark two or more: --span WORDS")
    starts = [mark[0] for mark in marks]
    ends = [*starts[1:], marks[-1][-1] + 1] if marks else []
    return position_invariant(model, list(zip(starts, ends, strict=True)))
