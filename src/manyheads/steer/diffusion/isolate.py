"""Isolation and reposition: subjects of a picture look at the background and at themselves, not at each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from manyheads.hosts.calls import AttentionCall
from manyheads.steer.diffusion.common import (
    Active,
    attended,
    changed,
    check_masks,
    check_rows,
    on_patches,
    parts,
    replaced_rows,
    taken,
)
from manyheads.steer.diffusion.drawing import Drawing, Rows, drawn_with, first_steps, read_boxes, referred
from manyheads.steer.method import steering

BACKGROUND = -1


def subjects_of(masks: Tensor) -> Tensor:
    """Masks [k, n] of subjects that do not overlap -> which subject each token is of, [n]; BACKGROUND for none."""
    if bool((masks.sum(0) > 1).any()):
        raise ValueError("isolate: subjects overlap; want masks that do not")
    return torch.where(masks.any(0), masks.int().argmax(0), BACKGROUND)


def may_see(queries: Tensor, keys: Tensor) -> Tensor:
    """[n], [m] of subjects -> [n, m]: a subject's token sees its own subject and background; background sees all."""
    return (queries[:, None] == BACKGROUND) | (keys == BACKGROUND) | (queries[:, None] == keys)


def reposition(features: Tensor, box: tuple[int, int, int, int], to: tuple[int, int, int, int]) -> Tensor:
    """features [b, h, w, e] with what lies in `box` (top, left, bottom, right in tokens) resized, bilinear with
    corners aligned, and put over `to`; everything else as it was. With equal boxes it is the identity."""
    for region in (box, to):
        if not (0 <= region[0] < region[2] <= features.shape[1] and 0 <= region[1] < region[3] <= features.shape[2]):
            raise ValueError(f"reposition: box {region} leaves a grid of {tuple(features.shape[1:3])} tokens")
    size = to[2] - to[0], to[3] - to[1]
    part = features[:, box[0] : box[2], box[1] : box[3]]
    if tuple(part.shape[1:3]) != size:
        part = interpolate(part.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    moved = features.clone()
    moved[:, to[0] : to[2], to[1] : to[3]] = part
    return moved


def _hidden(masks: Tensor, references: Mapping[int, int], inside: Tensor | None, n: int) -> Tensor:
    """[n, n + n of each reference], 0 or -inf: what every token sees of its own picture and of the references."""
    subjects = subjects_of(on_patches("isolate", masks, n))
    seen = [may_see(subjects, subjects)]
    if inside is not None:
        for subject in references:
            there = on_patches("isolate", inside[subject : subject + 1], n)[0].bool()
            seen.append(((subjects == subject) | (subjects == BACKGROUND))[:, None] & there)
    whole = ~torch.cat(seen, 1)
    return torch.zeros(whole.shape).masked_fill(whole, -math.inf)


@contextmanager
def isolate(
    model: Any,
    masks: Tensor,
    *,
    rows: Sequence[int] | None = None,
    references: Mapping[int, int] | None = None,
    reference_masks: Tensor | None = None,
    active: Active | None = None,
) -> Iterator[None]:
    """Claim: subjects that cannot attend each other do not run into each other.

    At self attention of the captions `rows` (None: all that are no reference): softmax(q [k_ref ; k]^T scale + mask)
    [v_ref ; v], where a token of subject a sees subject a and the background, no other subject, and background tokens
    see everything. masks: [k, height, width] of the picture, one per subject. references: subject -> place among the
    captions of a picture of it, whose tokens inside of reference_masks [k, height, width] that subject and the
    background see; None: no references. With one subject and no reference, or none, nothing changes.
    Source: arXiv 2411.19261 (isolation attention); no official code was at hand, the rule is the paper's as described
    there. Its reposition attention is `reposition`, a function on feature maps: attention without positions of its own
    does not tell where a token stands, so that moving queries, keys and values alone changes nothing here.
    """
    check_masks("isolate", model, masks)
    given = dict(references or {})
    if bool(given) != (reference_masks is not None) or not set(given) <= set(range(len(masks))):
        raise ValueError(f"isolate: references {given} of {len(masks)} subjects, and masks for them: give both or none")
    if reference_masks is not None:
        check_masks("isolate: reference_masks", model, reference_masks)

    own_rows, hidden = rows, dict[int, Tensor]()

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        if len(masks) < 2 and not given:
            return None
        n, halves_of, foreign = call.query.shape[2], parts(call, step), list(given.values())
        if n not in hidden:
            hidden[n] = _hidden(masks, given, reference_masks, n).to(call.query)
        rows: list[int] = []
        there: list[list[int]] = [[] for _ in given]
        for half in halves_of:
            check_rows("isolate: references", foreign, len(half))
            targets = [row for row in range(len(half)) if row not in foreign] if own_rows is None else own_rows
            rows += [half[row] for row in check_rows("isolate", targets, len(half))]
            for number, place in enumerate(foreign):
                there[number] += [half[place]] * len(targets)
        key, value = (torch.cat([taken(own, rows), *(own[of] for of in there)], 2) for own in (call.key, call.value))
        return replaced_rows(call, rows, attended(call, taken(call.query, rows), key, value, hidden[n]))

    with changed(model, "isolate", change, kind="self", active=active):
        yield


@steering(
    "isolate",
    title="subjects in boxes do not see each other",
    source="arXiv 2411.19261",
    kinds=("diffusion",),
    neutral={"share": 0.0},
    strength="share",
    reach=(0.0, 1.0),
    towers=("patches",),
)
def _open(
    model: Any,
    drawing: Drawing,
    *,
    boxes: str,
    source: str = "",
    subject: int = 0,
    box: str = "",
    share: float = 1.0,
) -> AbstractContextManager[Rows]:
    """boxes: [[top, left, bottom, right], ...] in pixels, a subject each. source: the caption of a reference of the
    subject with this number, from 0, drawn beside it or of the picture that is given; box: what of it is seen, all
    unless given. References of several subjects are given from Python."""
    masks = read_boxes(model, "isolate: boxes", boxes, least=2)
    subjects_of(masks.flatten(1))
    active = first_steps("isolate", drawing, share)
    if not source.strip():
        if drawing.picture is not None or box.strip() or subject:
            raise ValueError(
                "isolate: a picture, box and subject are of a reference: give source=CAPTION, what it shows"
            )
        return drawn_with(isolate(model, masks, active=active), Rows((drawing.caption,)))
    if not 0 <= subject < len(masks):
        raise ValueError(f"isolate: subject={subject} of {len(masks)} boxes: want 0 to {len(masks) - 1}")
    inside = torch.zeros_like(masks)
    inside[subject] = read_boxes(model, "isolate: box", f"[{box}]")[0] if box.strip() else True
    rows = referred(model, drawing, "isolate", source)
    return drawn_with(isolate(model, masks, references={subject: 1}, reference_masks=inside, active=active), rows)
