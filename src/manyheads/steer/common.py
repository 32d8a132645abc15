"""What interventions share: which heads they change, spans, and changing a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import opened
from manyheads.hosts.sites import choose, only_stack, text_stack
from manyheads.hosts.taps import AttentionCall, tap
from manyheads.hosts.thin import check_whole
from manyheads.runs.given import shown
from manyheads.steer.pictures import same_rows

# (layer, query head) pairs, as detectors name them.
Heads = Sequence[tuple[int, int]]
# Places in what was fed, the same for every row, or one's own in each: [b, n] bool.
Span = Sequence[int] | slice | Tensor


def parse_heads(text: str | None) -> list[tuple[int, int]] | None:
    """'3.1,4.2' -> [(3, 1), (4, 2)]: layer and query head, both from 0. None and '' are no choice: every head."""
    if not (text or "").strip():
        return None
    assert text is not None
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not re.fullmatch(r"[0-9]{1,5}\.[0-9]{1,5}", part)]
    if wrong:
        raise ValueError(f"heads {shown(text)!r}: {shown(wrong[0])!r} is no LAYER.HEAD; want such as 3.1,4.2")
    pairs = [(int(layer), int(head)) for layer, _, head in (part.partition(".") for part in parts)]
    twice = next((pair for pair in pairs if pairs.count(pair) > 1), None)
    if twice is not None:
        raise ValueError(f"heads {shown(text)!r}: {twice[0]}.{twice[1]} is there twice; give it once")
    return pairs


def some_heads(text: str, who: str) -> list[tuple[int, int]]:
    """The same where there is no such thing as every head."""
    found = parse_heads(text)
    if found is None:
        raise ValueError(f"{who} needs heads: {who}[heads=3.1,4.2]")
    return found


def heads_by_layer(model: nn.Module, heads: Heads | None, stack: str) -> dict[int, list[int] | None]:
    """layer of the stack -> its heads; None for all heads of a layer. heads None: everything."""
    if heads is None:
        return {site.layer: None for site in choose(model, None, stack, "self")}
    chosen: dict[int, list[int] | None] = {}
    if isinstance(heads, str) or any(isinstance(pair, str) or _length(pair) != 2 for pair in heads):
        raise ValueError(f"heads are (layer, head) pairs, such as [(3, 1), (4, 2)]; got {heads!r}")
    for layer, head in heads:
        own = chosen.setdefault(int(layer), [])
        assert own is not None
        own.append(int(head))
    if not chosen:
        raise ValueError("heads is empty: give (layer, head) pairs, or None for all heads")
    return chosen


def _length(each: Any) -> int:
    return len(each) if hasattr(each, "__len__") else 0


def positions(span: Sequence[int] | slice | Tensor, length: int) -> list[int]:
    """Places of tokens that are there; a span may end beyond them, as while decoding. ValueError for places counted
    from an end that moves on with every token, and for what marks places instead of naming them."""
    if isinstance(span, slice):
        bounds = [each for each in (span.start, span.stop) if each is not None]
        if any(each < 0 for each in bounds):
            raise ValueError(f"a span names places from 0; got {span}, and the end moves on while decoding")
        return list(range(*span.indices(length)))
    places = span.tolist() if isinstance(span, Tensor) else span
    if isinstance(places, str) or not isinstance(places, Iterable):
        raise ValueError(f"a span is places from 0, such as [3, 4] or slice(3, 5), or bool [b, n]; got {span!r}")
    places = list(places)
    wrong = [place for place in places if type(place) is bool or int(place) != place or place < 0]
    if wrong:
        raise ValueError(f"a span names places from 0; got {wrong} (or it is bool [b, n], a row for each of the batch)")
    return [int(place) for place in places if place < length]


def inside(span: Span, length: int, device: torch.device) -> Tensor:
    """[1 or b, length] bool: the places of a span among so many keys. What was fed later than a mask is not in it."""
    if isinstance(span, Tensor) and span.dim() > 1:
        if span.dtype != torch.bool or span.dim() != 2:
            raise ValueError(f"a span of each row is [b, n] bool; got {span.dtype} {list(span.shape)}")
        return nn.functional.pad(span, (0, max(0, length - span.shape[1])))[:, :length].to(device)
    found = torch.zeros(1, length, dtype=torch.bool, device=device)
    found[0, positions(span, length)] = True
    return found


def inside_call(span: Span, call: AttentionCall, who: str) -> Tensor:
    """[1 or b, m] bool: the places of a span among the call's keys; rows of a prompt for all of its beams."""
    check_whole(call.site.module, who)
    found = inside(span, call.key.shape[2], call.query.device)
    return found if len(found) == 1 else same_rows(found, call.query.shape[0], who)


def behind(places: Tensor, queries: int) -> Tensor:
    """[b, queries] bool: which of the last queries of places [b, m] stand behind all of them; none where a row has
    none."""
    m = places.shape[1]
    at = torch.arange(m, device=places.device)
    last = (places * (at + 1)).amax(-1, keepdim=True)
    return (at >= last)[:, m - queries :] & places.any(-1, keepdim=True)


def numbers(text: str, what: str) -> list[int]:
    """'2,3' -> [2, 3]."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
        raise ValueError(f"{what}={shown(text)}: want numbers such as 2,3")
    return [int(part) for part in parts]


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


def normalised(edited: Tensor, weights: Tensor, call: AttentionCall) -> Tensor:
    """Rows of the call's weights [b, h, n, m] after an edit that multiplied them, as a softmax of the scores with the
    logs added: they sum to 1 together with what a sink of the layer took; a row that sees nothing stays zero."""
    total = edited.sum(-1, keepdim=True)
    if call.shares and call.scoring.sinks is not None:
        total = total + 1 - weights.sum(-1, keepdim=True)
    return edited / total.clamp_min(torch.finfo(edited.dtype).tiny)


def check_share(name: str, value: float, most: float = 1.0) -> float:
    if not 0 <= value <= most:
        raise ValueError(f"{name} must lie between 0 and {most:g}; got {value}")
    return float(value)
