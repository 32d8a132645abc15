"""One pass of a model that draws over noisy pictures, with what attended meanwhile.

Shapes: b pictures, c channels, n patches (a square), m words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.taps import record
from manyheads.steer.diffusion.word_maps import mean_map


@dataclass(frozen=True)
class Pass:
    """rows: which picture of the album each is. captions, ids [b, m] and mask: what it was told. velocity and wanted
    [b, c, height, width]; told [b, m, e]: the words as cross attention reads them; maps [b, n, m]: attention
    to the words over heads and the layers of the largest map, and affinity [b, n, n]: attention of its patches to each
    other, likewise. Gradients reach the model through all."""

    rows: Sequence[int]
    captions: Sequence[str]
    ids: Tensor
    mask: Tensor
    velocity: Tensor
    wanted: Tensor
    maps: Tensor
    affinity: Tensor
    told: Tensor

    @property
    def error(self) -> Tensor:
        return (self.velocity - self.wanted) ** 2

    def word(self, row: int, word: str) -> Tensor | None:
        """The word's map [n] in a row, None where its caption does not have it."""
        place = self.place(row, word)
        return None if place is None else self.maps[row, :, place]

    def place(self, row: int, word: str) -> int | None:
        """After the word that begins every caption."""
        said = self.captions[row].split()
        return said.index(word) + 1 if word in said else None


def noisy(
    model: Any, pictures: Tensor, noise: Tensor, times: Tensor, captions: Sequence[str], rows: Sequence[int]
) -> Pass:
    """A pass over (1 - t) x + t noise. rows: the first of the pictures are these of an album, the others nobody's: they
    are in velocity and wanted alone."""
    ids, mask = model.encode(captions)
    t = times.reshape(-1, 1, 1, 1)
    with record(model) as calls:
        velocity = model((1 - t) * pictures + t * noise, times, ids, mask).velocity
    side = max(math.isqrt(call.query.shape[2]) for call in calls)
    maps = {kind: mean_map([call for call in calls if call.site.kind == kind], side) for kind in ("cross", "self")}
    own, wanted = len(rows), noise - pictures
    told = model.words(ids[:own]) + model.word_places[: ids.shape[1]]
    at = maps["cross"][:own], maps["self"][:own]
    return Pass(rows, captions[:own], ids[:own], mask[:own], velocity, wanted, *at, told)


def draw_noise(model: Any, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise of so many pictures, and times from the distribution that the packaged models learnt at (logit-normal)."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.sigmoid(torch.randn(count, generator=generator))
    size = model.config.image_size
    noise = torch.randn(count, model.config.num_channels, size, size, generator=generator)
    return noise.to(model.device, model.dtype), times.to(model.device, model.dtype)
