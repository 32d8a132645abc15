"""Multi-reference self attention: a picture is drawn with the looks of the subjects in other pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall
from manyheads.steer.common import check_share
from manyheads.steer.diffusion.common import (
    Active,
    attended,
    changed,
    check_masks,
    check_rows,
    on_patches,
    parts,
    replaced_rows,
)
from manyheads.steer.diffusion.drawing import Drawing, Rows, drawn_with, first_steps, read_boxes, referred
from manyheads.steer.method import steering


def _added(references: Mapping[int, Tensor], weights: float | Mapping[int, float], n: int) -> Tensor:
    """[1, 1, 1, n + n of each reference]: what is added to the scores of their tokens."""
    parts_of = [torch.zeros(n)]
    for place, mask in references.items():
        bonus = weights if isinstance(weights, int | float) else weights[place]
        inside = on_patches("multi_reference", mask[None], n)[0].bool()
        parts_of.append(torch.full((n,), float(bonus)).masked_fill(~inside.cpu(), -math.inf))
    return torch.cat(parts_of)[None, None, None]


@contextmanager
def multi_reference(
    model: Any,
    target: int,
    references: Mapping[int, Tensor],
    *,
    weights: float | Mapping[int, float] = 3.0,
    style_fidelity: float = 1.0,
    active: Active | None = None,
) -> Iterator[None]:
    """Claim: a target that also attends the masked tokens of reference pictures draws their subjects, with no training.

    At self attention of the target: softmax([q k^T scale ; q k_r^T scale + w_r for tokens inside of mask r, -inf
    outside]) [v ; v_r]. target, references: places among the captions, references with their masks [height, width];
    weights: w, added to scores. The half of a guided batch without captions is (1 - s) of that and s of the plain
    attention, s = style_fidelity. References attend as they would; they come from `invert` or `noised` and `held=`.
    With no reference, or masks that hold nothing, nothing changes. Weight 0 is not neutral: references are seen as
    they are.
    Source: arXiv 2405.13870, aim-uofa/FreeCustom `freecustom/mrsa.py`. The paper writes masks multiplied into the
    attention, the code adds w to scores, which is followed; there weight 0 hides the reference, here it does not.
    """
    check_share("multi_reference: style_fidelity", style_fidelity)
    given = {place: mask for place, mask in references.items() if bool(mask.any())}
    for mask in given.values():
        check_masks("multi_reference", model, mask[None])
    if target in references:
        raise ValueError(f"multi_reference: the target {target} is among its references {sorted(references)}")

    added: dict[int, Tensor] = {}

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        if not given:
            return None
        own_parts, rows, mixed = parts(call, step), [], []
        for number, half in enumerate(own_parts):
            check_rows("multi_reference", [target, *given], len(half))
            plain = style_fidelity if number < len(own_parts) - 1 else 0.0
            if plain < 1:
                rows.append(half[target])
                own = _joined(call, rows[-1], [half[place] for place in given])
                mixed.append(plain * call.output[rows[-1:]] + (1 - plain) * own)
        return replaced_rows(call, rows, torch.cat(mixed))

    def _joined(call: AttentionCall, own: int, there: list[int]) -> Tensor:
        n, rows = call.query.shape[2], [own, *there]
        if n not in added:
            added[n] = _added(given, weights, n).to(call.query)
        key, value = (torch.cat([tensor[[row]] for row in rows], 2) for tensor in (call.key, call.value))
        return attended(call, call.query[[own]], key, value, added[n])

    with changed(model, "multi_reference", change, kind="self", active=active):
        yield


@steering(
    "multi_reference",
    title="what a box of a reference picture shows is seen while drawing",
    source="arXiv 2405.13870",
    kinds=("diffusion",),
    neutral={"share": 0.0},
    strength="share",
    reach=(0.0, 1.0),
    towers=("patches",),
)
def _open(
    model: Any, drawing: Drawing, *, source: str, box: str, weight: float = 3.0, share: float = 1.0
) -> AbstractContextManager[Rows]:
    """source: the reference's caption, drawn beside it or of the picture that is given; box: [top, left, bottom, right]
    of it in pixels; weight: added to the scores of what the box holds. Several references are given from Python."""
    mask = read_boxes(model, "multi_reference: box", f"[{box}]")[0]
    rows = referred(model, drawing, "multi_reference", source)
    active = first_steps("multi_reference", drawing, share)
    return drawn_with(multi_reference(model, 0, {1: mask}, weights=weight, active=active), rows)
