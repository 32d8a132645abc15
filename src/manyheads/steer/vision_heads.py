"""VHD and VHR: which heads say something else when they see the picture, and those made louder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import opened
from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import tap
from manyheads.hosts.thin import check_whole
from manyheads.steer.common import check_share
from manyheads.steer.method import Prompt, steering
from manyheads.steer.pictures import blind, check_last, image_places, same_rows


def head_divergence(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """VHD, [b, layers, heads]: |o(text and image) - o(text alone)|_2 at the prompt's last place, o a head's output
    before the output projection. Without the image the text moves up to where it would stand alone.

    Source: arXiv 2412.13949; its code was not at hand.
    """
    return _choose(model, inputs, 1.0, 0.5, False)[0]


@contextmanager
def vision_heads(
    model: Any, inputs: Mapping[str, Any], scale: float = 2.0, *, share: float = 0.5, filtered: bool = True
) -> Iterator[Tensor]:
    """Claim: hallucination is the language prior speaking louder than the heads that see; made louder, they win.

    In every layer the `share` of heads with the highest VHD put out scale times what they do, from the prompt's last
    place on: o_h' = scale o_h. Chosen once per row on the prompt `inputs`, layer by layer, each with the layers below
    already reinforced; gives the choice [b, layers, heads]. scale 1 changes nothing. filtered: a head whose VHD lies
    above mean + deviation of its layer, and whose output is larger without the image, is not chosen.
    Source: arXiv 2412.13949 (scale 2, half of the heads). The filter is the paper's in words; its bound is from a
    summary.
    """
    check_share("vision_heads: share", share)
    if not scale >= 0:
        raise ValueError(f"vision_heads: scale must be at least 0; got {scale}")
    chosen = _choose(model, inputs, scale, share, filtered)[1]
    first = inputs["input_ids"].shape[1] - 1

    def reader(call: Any) -> Tensor | None:
        if scale == 1:
            return None
        own = opened(call, "vision_heads")
        check_whole(call.site.module, "vision_heads")
        return _louder(own.output, chosen[:, call.layer], own.key.shape[2] - own.query.shape[2], first, scale)

    with tap(model, reader, stack=text_stack(model), kind="self"):
        yield chosen


def _louder(output: Tensor, chosen: Tensor, past: int, first: int, scale: float) -> Tensor | None:
    """Output [b, h, n, e] of places from `past` on, scaled where they are `first` or later."""
    start = max(0, first - past)
    if start >= output.shape[2]:
        return None
    factors = 1 + (scale - 1) * same_rows(chosen, output.shape[0], "vision_heads").to(output)[:, :, None, None]
    return torch.cat([output[:, :, :start], output[:, :, start:] * factors], 2)


@torch.no_grad()
def _choose(model: Any, inputs: Mapping[str, Any], scale: float, share: float, filtered: bool) -> tuple[Tensor, Tensor]:
    """VHD and the choice, [b, layers, heads] each; the run with the picture is reinforced as it goes."""
    image_places(model, inputs, "vision_heads")
    check_last(inputs, "vision_heads")
    alone: dict[int, Tensor] = {}
    found: list[Tensor] = []
    picked: list[Tensor] = []

    def without(call: Any) -> None:
        alone[call.layer] = opened(call, "vision_heads").output[:, :, -1]

    def reinforce(call: Any) -> Tensor | None:
        output, other = call.output, alone[call.layer]
        divergence = (output[:, :, -1] - other).norm(dim=-1)
        found.append(divergence)
        if filtered:
            far = divergence > divergence.mean(-1, keepdim=True) + divergence.std(-1, keepdim=True)
            divergence = divergence.masked_fill(far & (other.norm(dim=-1) > output[:, :, -1].norm(dim=-1)), 0)
        count = round(share * divergence.shape[1])
        best = torch.zeros_like(divergence, dtype=torch.bool).scatter(1, divergence.topk(count, -1).indices, True)
        picked.append(best & (divergence > 0))
        return _louder(output, picked[-1], 0, output.shape[2] - 1, scale)

    stack, options = text_stack(model), {"use_cache": False}
    with tap(model, without, stack=stack, kind="self"):
        model(**blind(model, inputs, "vision_heads"), **options)
    with tap(model, reinforce, stack=stack, kind="self"):
        model(**inputs, **options)
    return torch.stack(found, 1), torch.stack(picked, 1)


@steering(
    "vision_heads",
    title="heads that see the picture made louder",
    source="arXiv 2412.13949",
    kinds=("vision-language",),
    neutral={"scale": 1.0},
    strength="scale",
    reach=(0.0, 5.0),
)
def _open(
    model: Any, prompt: Prompt, *, scale: float = 2.0, share: float = 0.5, filtered: bool = True
) -> AbstractContextManager[Tensor]:
    return vision_heads(model, prompt.inputs, scale, share=share, filtered=filtered)
