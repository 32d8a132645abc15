"""Colour propagation attention: every frame reads its neighbour's keys and values, in turn the next and the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall
from manyheads.steer.diffusion.common import Active, attended, changed, check_rows, parts, replaced_rows, taken
from manyheads.steer.diffusion.drawing import Drawing, Rows, beside, drawn_with, first_steps
from manyheads.steer.method import steering


def neighbour(frame: int, frames: int, step: int) -> int:
    """Whom a frame reads: the next one in steps 1, 3, ..., the one before in steps 0, 2, ...; at an end, itself."""
    return min(max(frame + (1 if step % 2 else -1), 0), frames - 1)


@contextmanager
def colour_propagation(
    model: Any, frames: Sequence[int], *, own: bool = True, active: Active | None = None
) -> Iterator[None]:
    """Claim: frames that attend their neighbours in turn come out in the same colours (here: the same strokes).

    At self attention of frame i: softmax(q_i [k_r ; k_i]^T scale) [v_r ; v_i] with r = `neighbour`; own=False leaves
    out k_i and v_i. frames: places among the captions, in order. One frame alone, or no step active: no change.
    Source: in the form of arXiv 2306.01732 (ColorDiffuser), of which no code is public: the equation is the abstract's,
    what a frame at an end reads is decided here, and its colour encoder is not.
    """

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        if len(frames) < 2:
            return None
        if step is None:
            raise ValueError("colour_propagation: goes by steps, and none is told: run the model by its sample()")
        rows: list[int] = []
        there: list[int] = []
        for half in parts(call, step):
            places = check_rows("colour_propagation", frames, len(half))
            rows += [half[place] for place in places]
            there += [half[places[neighbour(i, len(places), step.index)]] for i in range(len(places))]
        key, value = call.key[there], call.value[there]
        if own:
            key, value = torch.cat([key, taken(call.key, rows)], 2), torch.cat([value, taken(call.value, rows)], 2)
        return replaced_rows(call, rows, attended(call, taken(call.query, rows), key, value))

    with changed(model, "colour_propagation", change, kind="self", active=active):
        yield


@steering(
    "colour_propagation",
    title="frames drawn together read the next and the last in turn",
    source="arXiv 2306.01732",
    kinds=("diffusion",),
    neutral={"share": 0.0},
    strength="share",
    reach=(0.0, 1.0),
    towers=("patches",),
)
def _open(
    model: Any, drawing: Drawing, *, frames: str, own: bool = True, share: float = 1.0
) -> AbstractContextManager[Rows]:
    """frames: the captions of the frames behind it, parted by ;."""
    rows = beside(model, drawing, "colour_propagation", frames.split(";"))
    active = first_steps("colour_propagation", drawing, share)
    return drawn_with(colour_propagation(model, range(len(rows.captions)), own=own, active=active), rows)
