"""Parallel cross attention: every region of the picture reads a caption of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from manyheads.hosts.calls import AttentionCall
from manyheads.models.flow import whole_captions
from manyheads.steer.diffusion.common import (
    Active,
    OnPatches,
    Regions,
    changed,
    check_masks,
    check_rows,
    conditional,
    heard_words,
    replaced_rows,
    taken,
)
from manyheads.steer.diffusion.drawing import Drawing, Rows, drawn_with, read_regions, some_steps
from manyheads.steer.method import steering


@contextmanager
def regional_prompts(
    model: Any,
    captions: Sequence[str],
    masks: Tensor,
    *,
    weight: float = 1.0,
    rows: Sequence[int] | None = None,
    active: Active | None = None,
) -> Iterator[None]:
    """Claim: a region that reads only its own subject's words gets that subject, and no other.

    At cross attention of the captions `rows` (None: all): sum_k M_k CA(q, caption_k) over the regions, each summand
    softmax(q k_k^T scale) v_k with the words of its own caption. masks [k, height, width]: one per caption; where they
    sum to less than 1, the rest is the row's own caption's, so that weights sum to 1. weight scales all masks: 0
    changes nothing, and so does one region over everything with the row's own caption. The half of a guided batch
    that reads no caption stays as it is.
    Source: arXiv 2406.01388 (AutoStudio), donahowe/AutoStudio, its text branch. Different: the released code resizes
    masks bilinearly, which leaks over edges, and does not fill up what they leave; there is no subject branch here, for
    which a model needs an image adapter.
    """
    check_masks("regional_prompts", model, masks)
    captions = whole_captions(captions)
    if len(captions) != len(masks):
        raise ValueError(f"regional_prompts: {len(captions)} captions and {len(masks)} masks: want one for each")
    share = masks.float().sum(0) * weight
    if weight < 0 or bool((share > 1 + 1e-6).any()):
        raise ValueError(f"regional_prompts: masks times {weight} must be at least 0 and sum to 1 at most")
    regions, grids = Regions(heard_words(model, captions)), OnPatches("regional_prompts", masks.float() * weight)

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        if weight == 0:
            return None
        told = conditional(call, step)
        own = [
            told[row] for row in check_rows("regional_prompts", range(len(told)) if rows is None else rows, len(told))
        ]
        grid = grids.of(call)
        mixed = taken(call.output, own) * (1 - grid.sum(0))[:, None] + regions.read(call, taken(call.query, own), grid)
        return replaced_rows(call, own, mixed)

    with changed(model, "regional_prompts", change, kind="cross", active=active):
        yield


@steering(
    "regional_prompts",
    title="every region of the picture reads a caption of its own",
    source="arXiv 2406.01388",
    kinds=("diffusion",),
    neutral={"weight": 0.0},
    strength="weight",
    reach=(0.0, 1.0),
    towers=("words",),
)
def _open(
    model: Any, drawing: Drawing, *, regions: str, weight: float = 1.0, steps: str | None = None
) -> AbstractContextManager[Rows]:
    """regions: {"a 3": [top, left, bottom, right], ...} in pixels."""
    captions, masks = read_regions(model, "regional_prompts: regions", regions)
    active = some_steps("regional_prompts", drawing, steps)
    return drawn_with(regional_prompts(model, captions, masks, weight=weight, active=active), Rows((drawing.caption,)))
