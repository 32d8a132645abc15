"""AKI's mask in a model that was trained without it: image tokens see the question behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.attend import hides
from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import tap
from manyheads.steer.common import Span, check_share, inside, inside_call
from manyheads.steer.method import Prompt, steering
from manyheads.steer.pictures import image_places, same_rows


@contextmanager
def modality_mutual(
    model: nn.Module, image: Span, question: Span, amount: float = 1.0, *, stack: str | None = None
) -> Iterator[None]:
    """Claim: in a causal model what an image token becomes knows nothing of the question; shown to it, it does.

    Image token i may attend to the question's tokens besides what it may see already; all other rows, the answer's
    among them, stay causal. amount: between the output of the causal mask and that of this one, o' = o + amount
    (o_new - o); 0 changes nothing, and in training it takes gradients. image, question: places, or [b, n] bool for each
    row's own. Both must be read in one pass.
    Source: arXiv 2503.02597, sony/aki `_make_modality_mutual_mask`, whose model is trained with it; `amount` is ours,
    for a model that was not. As a mechanism: modality-mutual.
    """
    check_share("modality_mutual: amount", amount)
    where = text_stack(model, stack)

    def reader(call: Any) -> Tensor | None:
        return None if amount == 0 else _shown(opened(call, "modality_mutual"), image, question, amount)

    with tap(model, reader, stack=where, kind="self"):
        yield


def _shown(call: AttentionCall, image: Span, question: Span, amount: float) -> Tensor | None:
    n, m = call.query.shape[2], call.key.shape[2]
    device = call.query.device
    asking = inside_call(image, call, "modality_mutual")[:, m - n :]
    asked = inside(question, max(m, _end(question)), device)
    asked = asked if len(asked) == 1 else same_rows(asked, call.query.shape[0], "modality_mutual")
    if not bool(asking.any()) or not bool(asked.any()):
        return None
    if bool(asked[:, m:].any()):
        raise ValueError("modality_mutual: the question is not all there: read the image and the question in one pass")
    if call.mask is not None and call.mask.is_floating_point() and bool((~hides(call.mask) & (call.mask != 0)).any()):
        raise ValueError(f"{call.site.path} adds a position bias to its scores: its mask cannot be opened")
    rows = asking.any(0).nonzero()[:, 0]
    part = slice(int(rows[0]), int(rows[-1]) + 1)
    seen = call.visible(part)
    seen = torch.ones(1, 1, 1, m, dtype=torch.bool, device=device) if seen is None else seen
    real = torch.ones(1, 1, 1, m, dtype=torch.bool, device=device)
    if call.mask is not None:  # padding stays hidden: it is seen by no query at all
        real = call.visible().any(-2, keepdim=True)  # type: ignore[union-attr]
    opened_ = seen | (asking[:, None, part, None] & asked[:, None, None, :m] & real)
    again = AttentionCall(call.site, call.query[:, :, part], call.key, call.value, opened_, False, call.scoring)
    again.output, again.dropout = call.output[:, :, part], call.dropout
    new = again.mix(lambda weights, _: weights)
    old = call.output[:, :, part]
    mixed = torch.where(asking[:, None, part, None], old + amount * (new - old), old)
    return torch.cat([call.output[:, :, : part.start], mixed, call.output[:, :, part.stop :]], 2)


def _end(span: Span) -> int:
    if isinstance(span, Tensor):
        return span.shape[1]
    if isinstance(span, slice):
        return int(span.stop or 0)
    return max(span, default=-1) + 1


@steering(
    "modality_mutual",
    title="image tokens that see the question behind them",
    source="arXiv 2503.02597",
    kinds=("vision-language",),
    neutral={"amount": 0.0},
    strength="amount",
    reach=(0.0, 1.0),
)
def _open(model: Any, prompt: Prompt, *, amount: float = 1.0, span: str | None = None) -> AbstractContextManager[None]:
    """The question: the marked words, or all that stands behind the image."""
    image = image_places(model, prompt.inputs, "modality_mutual")
    last = int(image[0].nonzero()[-1])
    question = list(range(last + 1, image.shape[1])) if span is None else prompt.places(span)
    early = [place for place in question if place <= last]
    if early:
        raise ValueError(f"modality_mutual: the question must stand behind the image; places {early[:3]} do not")
    return modality_mutual(model, image, question, amount)
