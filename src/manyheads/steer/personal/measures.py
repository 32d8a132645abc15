"""What a personalised model does with its subject, and with everything else.

Shapes: b pictures, n patches.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from manyheads.steer.diffusion.common import on_patches
from manyheads.steer.drawn import unknown
from manyheads.steer.personal.passes import draw_noise, noisy
from manyheads.steer.personal.subjects import Album
from manyheads.tasks.two_digits import RELATIONS, SIZE, WORDS
from manyheads.tasks.two_digits import shown as read_scenes

# Pictures that are looked at, and times at which attention is.
MOST, LEAK_AT = 8, (0.2, 0.4, 0.6)
PROBES = [f"a {i % 10} {list(RELATIONS)[i % 4]} a {(3 * i + 7) % 10}" for i in range(12)]


def measures(model: Any, album: Album, before: Sequence[Tensor], *, steps: int, seed: int) -> dict[str, Any]:
    """error: how badly the model knows the pictures under their captions (`unknown`); alike: of each caption's drawing,
    the cosine of its light to the nearest picture of that caption; leak: share of the subjects' attention outside of
    their masks, None without masks; changed: root mean square of the drawings of captions in words of before, against
    those of the model that has learnt nothing (`before`); kept: of captions of two digits the share drawn right, None
    where a model knows none."""
    told = list(dict.fromkeys(album.captions))[:MOST]
    rows = range(min(MOST, len(album.pictures)))
    drawn = model.sample(told, steps=steps, seed=seed)
    now = drawings_of_before(model, album, steps=steps, seed=seed)
    change = torch.cat([(a - b).flatten() for a, b in zip(now, before, strict=True)]).double()
    return {
        "error": statistics.fmean(unknown(model, album.pictures[i : i + 1], album.captions[i]) for i in rows),
        "alike": statistics.fmean(_nearest(album, told[i], drawn[i]) for i in range(len(told))),
        "leak": leak(model, album, seed),
        "changed": float(change.square().mean().sqrt()),
        "kept": kept(model, steps=steps, seed=seed),
    }


def other_captions(album: Album) -> list[str]:
    """The captions in words of before, as far as they then have no subject, and the empty one."""
    told = dict.fromkeys(album.before(caption) for caption in album.captions)
    return [*[own for own in told if not set(own.split()) & set(album.words)][:MOST], ""]


def drawings_of_before(model: Any, album: Album, *, steps: int, seed: int, count: int = 4) -> list[Tensor]:
    """Of each of the other captions, [count, c, height, width]."""
    return [model.sample([caption] * count, steps=steps, seed=seed) for caption in other_captions(album)]


def _nearest(album: Album, caption: str, drawn: Tensor) -> float:
    own = album.pictures[[i for i, said in enumerate(album.captions) if said == caption]]
    return float(cosine_similarity(own.flatten(1) + 1, drawn.clamp(-1, 1).flatten()[None] + 1).max())


@torch.no_grad()
def leak(model: Any, album: Album, seed: int) -> float | None:
    """The mean over masks of the share of a word's attention, over heads and layers, that comes from outside."""
    rows = sorted({row for row, _ in album.masks})[:MOST]
    if not rows:
        return None
    shares = []
    for time in LEAK_AT:
        noise, _ = draw_noise(model, len(rows), seed)
        times = torch.full((len(rows),), time, device=model.device, dtype=model.dtype)
        own = noisy(model, album.pictures[rows], noise, times, [album.captions[row] for row in rows], rows)
        for place, row in enumerate(rows):
            for word in album.words:
                found, mask = own.word(place, word), album.masks.get((row, word))
                if found is not None and mask is not None:
                    inside = on_patches("mask", mask[None], found.numel())[0].to(found.device)
                    shares.append(float(found[~inside].sum() / found.sum()))
    return statistics.fmean(shares)


def kept(model: Any, *, steps: int, seed: int) -> float | None:
    """Of a model of two digits: the share of captions that it draws right, as the packaged judge reads them."""
    own = model.config
    if (own.image_size, own.num_channels) != (SIZE, 1) or not set(WORDS) <= set(own.words):
        return None
    right = [found["right"] for found in read_scenes(model.sample(PROBES, steps=steps, seed=seed), PROBES)]
    return statistics.fmean(right)
