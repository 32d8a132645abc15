"""Space-time attention: every object's own caption is added inside of a disc around its place, as much as its step
says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall
from manyheads.steer.diffusion.common import Active, attended, changed, halves, heard_words, replaced_rows
from manyheads.steer.diffusion.drawing import Drawing, Rows, drawn_with, read_centres, some_steps
from manyheads.steer.method import steering

RADIUS = 0.2


def disc(side: int, centre: tuple[float, float], radius: float = RADIUS) -> Tensor:
    """[side * side], True for tokens (i / side, j / side) within the radius of the centre (row, column in 0..1)."""
    if not all(0 <= part <= 1 for part in centre) or radius <= 0:
        raise ValueError(f"disc: centre {centre} and radius {radius}: want a place in 0..1 and a radius above 0")
    at = torch.arange(side) / side
    return ((at[:, None] - centre[0]) ** 2 + (at - centre[1]) ** 2 <= radius**2).flatten()


@contextmanager
def space_time(
    model: Any,
    captions: Sequence[str],
    centres: Sequence[tuple[float, float]],
    coefficients: float | Sequence[Sequence[float]],
    *,
    radius: float = RADIUS,
    active: Active | None = None,
) -> Iterator[None]:
    """Claim: objects left out by the full caption appear where their own caption is mixed in.

    At cross attention of every captioned row: g + sum_k M_k c_k(t) (g_k - g_0), g of the full caption, g_k = CA(q,
    caption of object k), g_0 of the row without a caption at the same place of the batch, M_k the disc around centre k
    (row, column in 0..1). coefficients: c, one number, or [steps][objects]; 0 changes nothing. Discs that overlap add.
    Runs inside of a guided sample, which has rows without captions.
    Source: arXiv 2304.03869, UCSB-NLP-Chang/Diffusion-SpaceTime-Attn, whose code is followed: it subtracts the row
    without caption, where the paper writes a convex mixture with the full caption. Not here: its layout predictor, and
    the search for coefficients by CLIP.
    """
    if len(captions) != len(centres) or not captions:
        raise ValueError(f"space_time: {len(captions)} captions and {len(centres)} centres: want one for each")
    words = heard_words(model, captions)
    for centre in centres:
        disc(1, centre, radius)

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        plain_rows, told = ([], []) if step is None else halves(len(call.query), step)
        if not plain_rows:
            raise ValueError("space_time: wants a guided sample(): rows without captions stand beside those with one")
        c = _row(coefficients, step, len(captions))
        if not any(c):
            return None
        read, mixed = words[call.site.path], call.output[told]
        plain, query = call.output[plain_rows], call.query[told]
        for number, (centre, share) in enumerate(zip(centres, c, strict=True)):
            inside = disc(math.isqrt(query.shape[2]), centre, radius).to(query)[:, None]
            key, value = (tensor[number : number + 1].expand(len(told), -1, -1, -1) for tensor in read[:2])
            own = attended(call, query, key, value, read.added[number : number + 1])
            mixed = mixed + inside * share * (own - plain)
        return replaced_rows(call, told, mixed)

    with changed(model, "space_time", change, kind="cross", active=active):
        yield


def _row(coefficients: float | Sequence[Sequence[float]], step: Any, objects: int) -> list[float]:
    if isinstance(coefficients, int | float):
        return [float(coefficients)] * objects
    if len(coefficients) != step.count or len(coefficients[step.index]) != objects:
        raise ValueError(
            f"space_time: coefficients for {len(coefficients)} steps; want [{step.count}][{objects}], or one number"
        )
    return [float(own) for own in coefficients[step.index]]


@steering(
    "space_time",
    title="each object's own caption is added around its place",
    source="arXiv 2304.03869",
    kinds=("diffusion",),
    neutral={"coefficient": 0.0},
    strength="coefficient",
    reach=(0.0, 2.0),
    towers=("words",),
)
def _open(
    model: Any,
    drawing: Drawing,
    *,
    objects: str,
    coefficient: float = 0.5,
    radius: float = RADIUS,
    steps: str | None = None,
) -> AbstractContextManager[Rows]:
    """objects: {"a 3": [row, column], ...}, places from 0 to 1."""
    captions, centres = read_centres("space_time: objects", objects)
    active = some_steps("space_time", drawing, steps)
    change = space_time(model, captions, centres, coefficient, radius=radius, active=active)
    return drawn_with(change, Rows((drawing.caption,)))
