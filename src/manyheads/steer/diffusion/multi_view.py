"""Decoupled multi-view attention: beside its self attention a view attends the same row of all views, in parallel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from manyheads.hosts.calls import AttentionCall
from manyheads.steer.diffusion.common import Active, attended, changed, check_rows, parts, replaced_rows, taken
from manyheads.steer.diffusion.drawing import Drawing, Rows, beside, drawn_with, some_steps
from manyheads.steer.method import steering


@contextmanager
def multi_view(
    model: Any,
    views: Sequence[int],
    *,
    scale: float = 1.0,
    reference: int | None = None,
    reference_scale: float = 0.0,
    active: Active | None = None,
) -> Iterator[None]:
    """Claim: views that also attend each other's rows agree with each other, and the base model keeps what it knows.

    At self attention of the rows `views` (places among the captions), y = base + scale mv + reference_scale ref, all
    three from the same input: mv, a query in row i of its view attends the tokens of row i of ALL views, its own
    included; ref, every query attends all tokens of the reference's row. Scales 0 change nothing.
    Source: arXiv 2412.03632, huanngzh/MV-Adapter (DecoupledMVRowSelfAttnProcessor). Different: there the branches have
    projections of their own, begun as copies of the base's with an output of zeros, and trained; here they ARE the
    base's, untrained, and the scales do what training would have to. Square grids; batch order is free.
    """

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        if scale == 0 and (reference is None or reference_scale == 0):
            return None
        groups = [[half[place] for place in check_rows("multi_view", views, len(half))] for half in parts(call, step)]
        rows = [row for group in groups for row in group]
        out = taken(call.output, rows) + scale * _across(call, rows, len(groups))
        if reference is not None and reference_scale != 0:
            there: list[int] = []
            for half in parts(call, step):
                there += [half[check_rows("multi_view: reference", [reference], len(half))[0]]] * len(views)
            out = out + reference_scale * attended(call, taken(call.query, rows), call.key[there], call.value[there])
        return replaced_rows(call, rows, out)

    with changed(model, "multi_view", change, kind="self", active=active):
        yield


def _across(call: AttentionCall, rows: list[int], groups: int) -> Tensor:
    """[views of all groups, h, n, e] of each view's rows attending the same rows of all views of its group."""
    side = math.isqrt(call.query.shape[2])
    if side * side != call.query.shape[2]:
        raise ValueError(f"multi_view: {call.query.shape[2]} patches are no square grid")
    # [groups * views, h, n, d] -> a batch of picture rows: [groups * side, h, views * side, d]
    query, key, value = (
        taken(tensor, rows)
        .unflatten(0, (groups, -1))
        .unflatten(3, (side, side))
        .permute(0, 3, 2, 1, 4, 5)
        .flatten(3, 4)
        .flatten(0, 1)
        for tensor in (call.query, call.key, call.value)
    )
    out = attended(call, query, key, value).unflatten(0, (groups, side)).unflatten(3, (-1, side))
    return out.permute(0, 3, 2, 1, 4, 5).flatten(3, 4).flatten(0, 1)


@steering(
    "multi_view",
    title="views drawn together attend each other's rows",
    source="arXiv 2412.03632",
    kinds=("diffusion",),
    neutral={"scale": 0.0},
    strength="scale",
    reach=(0.0, 2.0),
    towers=("patches",),
)
def _open(
    model: Any, drawing: Drawing, *, views: str, scale: float = 1.0, steps: str | None = None
) -> AbstractContextManager[Rows]:
    """views: the captions of the other views, parted by ;."""
    rows, active = beside(model, drawing, "multi_view", views.split(";")), some_steps("multi_view", drawing, steps)
    return drawn_with(multi_view(model, range(len(rows.captions)), scale=scale, active=active), rows)
