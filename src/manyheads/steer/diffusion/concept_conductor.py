"""Concept Conductor: layout guidance on the latent, masks from what patches look like, and features merged by mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall
from manyheads.hosts.taps import record
from manyheads.steer.diffusion.common import (
    Active,
    OnPatches,
    changed,
    check_masks,
    check_rows,
    conditional,
    moving,
    replaced_rows,
)
from manyheads.steer.diffusion.drawing import Drawing, Rows, drawn_with, first_steps, read_regions, some_steps
from manyheads.steer.method import steering


@contextmanager
def layout_guidance(
    model: Any,
    layout: Tensor,
    *,
    strength: float = 1.0,
    layers: Sequence[int] | None = None,
    active: Active | None = None,
) -> Iterator[None]:
    """Claim: pictures pulled towards the self attention of a layout picture take its arrangement.

    Before each step: x <- x - strength dE/dx, E = sum over layers of the mean over pictures of sum over queries and
    keys of (A(x) - A(layout_t))^2, A the self attention averaged over heads, both of the row's own caption at this
    step's time. layout: [steps + 1, b or 1, c, height, width], as `noised` or `invert` give it. active(step, 0): the
    steps; strength 0 changes nothing. Costs two more passes of the captions and a backward pass a step.
    Source: arXiv 2408.03632, Nihukat/Concept-Conductor (layout guidance). Different: there the energy may also be of
    queries or features, by configuration; here it is of attention maps, summed over all n x n of them.
    """

    def move(pictures: Tensor, step: Any) -> Tensor:
        if strength == 0 or (active is not None and not active(step.index, 0)):
            return pictures
        if len(layout) != step.count + 1 or layout.shape[1] not in (1, len(pictures)):
            raise ValueError(
                f"layout_guidance: layout is {tuple(layout.shape)}; want [{step.count + 1}, 1 or {len(pictures)}, ...]"
            )
        with torch.no_grad():
            wanted = self_maps(model, layout[step.index].expand_as(pictures), step, layers)
        with torch.enable_grad():
            x = pictures.detach().requires_grad_()
            found = self_maps(model, x, step, layers)
            energy = sum(((a - b) ** 2).sum((1, 2)).sum() for a, b in zip(found, wanted, strict=True))
            assert isinstance(energy, Tensor)
            slope = torch.autograd.grad(energy, x)[0]
        return pictures - strength * slope

    with moving(model, move):
        yield


def self_maps(model: Any, pictures: Tensor, step: Any, layers: Sequence[int] | None) -> list[Tensor]:
    """Self attention averaged over heads, [b, n, n] of each layer, of pictures under a step's captions."""
    with record(model, layers=layers, kind="self") as calls:
        model.velocities(pictures, step.time, step.ids, step.mask)
        return [call.weights().mean(1) for call in calls]


def masks_by_kind(features: Tensor, count: int, *, rounds: int = 20) -> Tensor:
    """k-means of the features [n, e] of one picture's patches -> masks [count, n], True where a patch is of the kind.
    Begins with the patch farthest from the mean, then each time with the one farthest from all centres so far, so that
    it gives the same each time."""
    if not 1 <= count <= len(features):
        raise ValueError(f"masks_by_kind: {count} kinds of {len(features)} patches: want 1 to {len(features)}")
    far = (features - features.mean(0)).norm(dim=-1).argmax()
    centres = features[far][None]
    while len(centres) < count:
        centres = torch.cat([centres, features[torch.cdist(features, centres).amin(1).argmax()][None]])
    for _ in range(rounds):
        own = torch.cdist(features, centres).argmin(1)
        kept = [features[own == kind].mean(0) if bool((own == kind).any()) else centres[kind] for kind in range(count)]
        centres = torch.stack(kept)
    return torch.nn.functional.one_hot(torch.cdist(features, centres).argmin(1), count).T.bool()


def merged(base: Tensor, others: Sequence[Tensor], masks: Tensor) -> Tensor:
    """base [..., n, e] with others[k] inside of masks[k] [n]; where masks overlap, the last one's."""
    for other, mask in zip(others, masks, strict=True):
        base = base * ~mask[:, None] + other * mask[:, None]
    return base


@contextmanager
def merge_concepts(
    model: Any, base: int, concepts: Mapping[int, Tensor], *, kind: str = "cross", active: Active | None = None
) -> Iterator[None]:
    """Claim: concepts drawn by branches of their own, merged into one picture by mask, do not mix.

    The head outputs of the base's captioned row become F (1 - M_k) + F_k M_k for every concept k in turn: F_k of the
    row of that caption, M_k [height, width]. base, concepts: places among the captions. kind: at which attention. With
    masks that hold nothing, or no concept, nothing changes; the half of the batch without captions never does.
    Source: arXiv 2408.03632, Nihukat/Concept-Conductor (feature_output merged after the projection, which as a linear
    map without the masks' edges is the same). There each branch is a model with weights of its own.
    """
    given = {place: mask for place, mask in concepts.items() if bool(mask.any())}
    for mask in given.values():
        check_masks("merge_concepts", model, mask[None])
    grids = OnPatches("merge_concepts", torch.stack(list(given.values()))) if given else None

    def change(call: AttentionCall, step: Any) -> Tensor | None:
        if grids is None:
            return None
        told = conditional(call, step)
        check_rows("merge_concepts", [base, *given], len(told))
        others = [call.output[told[place]] for place in given]
        mixed = merged(call.output[told[base]], others, grids.of(call).bool())
        return replaced_rows(call, [told[base]], mixed[None])

    with changed(model, "merge_concepts", change, kind=kind, active=active):
        yield


@steering(
    "layout_guidance",
    title="pulled towards the self attention of a layout picture",
    source="arXiv 2408.03632",
    kinds=("diffusion",),
    neutral={"strength": 0.0},
    strength="strength",
    reach=(0.0, 4.0),
    towers=("patches",),
)
def _open_layout(
    model: Any, drawing: Drawing, *, source: str = "", strength: float = 1.0, steps: str | None = None
) -> AbstractContextManager[Rows]:
    """The layout is the picture that is given, or a drawing of the caption `source`."""
    layout = drawing.picture
    if layout is None and not source.strip():
        raise ValueError("layout_guidance needs a layout: give --image FILE, or layout_guidance[source=CAPTION]")
    if layout is None:
        layout = model.sample([source], steps=drawing.steps, seed=drawing.seed, guidance=drawing.guidance)
    way = model.noised(layout, steps=drawing.steps, seed=drawing.seed)
    active = some_steps("layout_guidance", drawing, steps)
    return drawn_with(layout_guidance(model, way, strength=strength, active=active), Rows((drawing.caption,)))


@steering(
    "merge_concepts",
    title="concepts drawn beside the picture, merged into it by boxes",
    source="arXiv 2408.03632",
    kinds=("diffusion",),
    neutral={"share": 0.0},
    strength="share",
    reach=(0.0, 1.0),
    towers=("words",),
)
def _open_concepts(model: Any, drawing: Drawing, *, concepts: str, share: float = 1.0) -> AbstractContextManager[Rows]:
    """concepts: {"a 3": [top, left, bottom, right], ...} in pixels, each drawn beside the picture."""
    captions, masks = read_regions(model, "merge_concepts: concepts", concepts)
    rows, active = Rows((drawing.caption, *captions)), first_steps("merge_concepts", drawing, share)
    model.encode(captions)
    return drawn_with(merge_concepts(model, 0, dict(enumerate(masks, 1)), active=active), rows)
