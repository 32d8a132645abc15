"""Space-time attention: every object's own caption is added inside of a disc around its place, as much as its step
says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall
from manyheads.steer.diffusion.common import Active, Regions, changed, halves, heard_words, replaced_rows, taken
from manyheads.steer.diffusion.drawing import Drawing, Rows, drawn_with, read_centres, some_steps
from manyheads.steer.method import steering

RADIUS = 0.2


def disc(side: int, centre: tuple[float, float], radius: float = RADIUS) -> Tensor:
    """[side * side], True for tokens (i / side, j / side) within the radius of the centre (row, column in 0..1)."""
    if not all(0 <= part <= 1 for part in centre) or radius <= 0:
        raise ValueError(f"disc: centre {centre} and radius {radius}: want a place in 0..1 and a radius above 0")
    at = torch.arange(side) / side
    return ((at[:, None] - centre[0]) ** 2 + (at - centre[1]) ** 2 <= radius**2).flatten()


def _shares(
    side: int, centres: Sequence[tuple[float, float]], radius: float, c: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The patches that a disc changes, [p] of side * side, and [objects, p]: c_k for those inside of disc k."""
    shares = torch.stack([disc(side, centre, radius) * own for centre, own in zip(centres, c, strict=True)])
    places = shares.any(0).nonzero()[:, 0]
    return places, shares[:, places]


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
    regions, discs = Regions(heard_words(model, captions)), cache(lambda side, c: _shares(side, centres, radius, c))
    for centre in centres:
        disc(1, centre, radius)

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        plain_rows, told = ([], []) if step is None else halves(len(call.query), step)
        if not plain_rows:
            raise ValueError("space_time: wants a guided sample(): rows without captions stand beside those with one")
        c = _row(coefficients, step, len(captions))
        if not any(c):
            return None
        # Patches in no disc keep what they have: captions are read by the others alone.
        places, shares = discs(math.isqrt(call.query.shape[2]), tuple(c))
        places, shares = places.to(call.query.device), shares.to(call.query)
        query, plain = (
            taken(rows, own).index_select(2, places) for rows, own in ((call.query, told), (call.output, plain_rows))
        )
        own = regions.read(call, query, shares) - shares.sum(0)[:, None] * plain
        return replaced_rows(call, told, taken(call.output, told).index_add(2, places, own.to(call.output.dtype)))

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
