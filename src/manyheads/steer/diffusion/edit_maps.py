"""Edits of attention maps by word and by source: emphasise, erase, replace, shift, count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall
from manyheads.steer.diffusion.common import (
    Active,
    attended,
    changed,
    check_rows,
    conditional,
    per_head,
    replaced_rows,
)
from manyheads.steer.diffusion.drawing import Drawing, Rows, drawn_with, first_steps, referred, some_steps, word_places
from manyheads.steer.method import steering


@contextmanager
def edit_words(
    model: Any,
    words: Sequence[int],
    *,
    add: float = 0.0,
    times: float = 1.0,
    patches: slice = slice(None),
    rows: Sequence[int] | None = None,
    active: Active | None = None,
) -> Iterator[None]:
    """Claim: how much a word counts in a picture (or a motion) is its column of the cross attention.

    A[rows, :, patches, words] <- times A + add, after the softmax and without making rows sum to 1 again. words: places
    in the caption as the model reads it (0 is the start word). add > 0 emphasises, times < 1 erases; 0 and 1 change
    nothing. rows: places among the captions; None: all of them.
    Source: arXiv 2410.18977 (MotionCLR), IDEA-Research/MotionCLR `models/unet.py`. Different: the released code counts
    words from 1 when it emphasises and from 0 when it erases, and takes the next token along each time; here a place is
    a place, and only what is named changes. Its motions have frames where pictures have patches.
    """
    if any(word < 0 for word in words) or times < 0:
        raise ValueError(f"edit_words: words {list(words)} are places from 0, and times={times} at least 0")

    columns: dict[tuple[int, int], Tensor] = {}

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        if add == 0 and times == 1:
            return None
        told = conditional(call, step)
        own = [told[row] for row in check_rows("edit_words", range(len(told)) if rows is None else rows, len(told))]
        beyond = [word for word in words if word >= call.key.shape[2]]
        if beyond:
            raise ValueError(f"edit_words: no word at {beyond}: the captions have {call.key.shape[2]} places")
        size = call.query.shape[2], call.key.shape[2]
        if size not in columns:
            columns[size] = torch.zeros(size, dtype=torch.bool, device=call.query.device)
            columns[size][patches, list(words)] = True

        def edit(weights: Tensor, lines: slice) -> Tensor:
            here = columns[size][lines]
            # A hidden word's weight is 0 however often it is taken, and stays so.
            if add:
                seen = call.visible(lines)
                here = here if seen is None else here & seen.expand(len(call.query), -1, -1, -1)[own]
            return torch.where(here, times * weights + add, weights)

        # Rows that are not named keep the layer's own output to the bit.
        return replaced_rows(call, own, call.mix_rows(edit, own))

    with changed(model, "edit_words", change, kind="cross", active=active):
        yield


@contextmanager
def borrow_maps(
    model: Any, source: int, *, words: Sequence[int] | None = None, shift: int = 0, active: Active | None = None
) -> Iterator[None]:
    """Claim: a sample that takes another's maps takes its layout (a motion, its timing).

    Of every captioned row but the source's: self attention goes by the source's queries and keys, both turned by
    `shift` places (the last ones come first). words: the cross attention is the source's as well, but for these words'
    columns, which stay the row's own; None leaves cross attention alone. active: the steps; none active, no change.
    Source: arXiv 2410.18977 (MotionCLR: replace, and shift in time). The released shift turns values as well, of the
    source itself: give it no other rows and that is a turn of the whole, which changes places of the output alone.
    """

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        told = conditional(call, step)
        own = told[check_rows("borrow_maps: source", [source], len(told))[0]]
        rows = [row for row in told if row != own]
        crossing = call.site.kind == "cross"
        if not rows or (crossing and words is None):
            return None
        if not crossing:
            query, key = (
                tensor[own : own + 1].roll(shift, 2).expand(len(rows), -1, -1, -1) for tensor in (call.query, call.key)
            )
            return replaced_rows(call, rows, attended(call, query, key, call.value[rows]))
        weights = call.weights()
        kept = torch.zeros(weights.shape[-1], dtype=torch.bool, device=weights.device)
        kept[list(words or ())] = True
        mixed = torch.where(kept, weights[rows], weights[own : own + 1])
        return replaced_rows(call, rows, mixed.to(call.value.dtype) @ per_head(call.value[rows], call.heads))

    with changed(model, "borrow_maps", change, kind="self", active=active):
        if words is None:
            yield
            return
        with changed(model, "borrow_maps", change, kind="cross", active=active):
            yield


def count_peaks(curve: Tensor) -> int:
    """How many actions: peaks of a word's cross attention [frames] over its mean, plateaus once (arXiv 2410.18977)."""
    if curve.ndim != 1:
        raise ValueError(f"count_peaks: want a curve [frames]; got {tuple(curve.shape)}")
    high = torch.unique_consecutive(curve).tolist()
    mean = float(curve.mean())
    inner = range(1, len(high) - 1)
    return sum(high[i] > mean and high[i] > high[i - 1] and high[i] > high[i + 1] for i in inner)


@steering(
    "edit_words",
    title="words of the caption erased or emphasised in the cross attention",
    source="arXiv 2410.18977",
    kinds=("diffusion",),
    neutral={"times": 1.0, "add": 0.0},
    strength="times",
    reach=(0.0, 4.0),
    towers=("words",),
)
def _open_words(
    model: Any, drawing: Drawing, *, words: str, times: float = 0.0, add: float = 0.0, steps: str | None = None
) -> AbstractContextManager[Rows]:
    """words: as they stand in the caption, with commas."""
    places, active = word_places(model, drawing, "edit_words", words), some_steps("edit_words", drawing, steps)
    return drawn_with(edit_words(model, places, add=add, times=times, active=active), Rows((drawing.caption,)))


@steering(
    "borrow_maps",
    title="drawn with the attention maps of another drawing",
    source="arXiv 2410.18977",
    kinds=("diffusion",),
    neutral={"share": 0.0},
    strength="share",
    reach=(0.0, 1.0),
    towers=("patches", "words"),
)
def _open_maps(
    model: Any, drawing: Drawing, *, source: str, words: str | None = None, shift: int = 0, share: float = 0.5
) -> AbstractContextManager[Rows]:
    """source: the other's caption, drawn beside it or of the picture that is given. words: the cross attention is
    borrowed as well, but for these words of the caption."""
    rows = referred(model, drawing, "borrow_maps", source)
    kept = None if words is None else word_places(model, drawing, "borrow_maps", words)
    active = first_steps("borrow_maps", drawing, share)
    return drawn_with(borrow_maps(model, 1, words=kept, shift=shift, active=active), rows)
