"""DisenDiff: the words of new concepts bound to their classes, and classes kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.steer.diffusion.word_maps import scaled_map, smoothed
from manyheads.steer.personal.form import Lesson, personalising
from manyheads.steer.personal.passes import Pass
from manyheads.steer.personal.subjects import Album


def soft_overlap(one: Tensor, two: Tensor) -> Tensor:
    """(sum ab + 1) / (sum (a + b) - sum ab + 1), as DisenDiff counts it; of equal maps of 0 and 1 it is 1."""
    both = (one * two).sum(-1)
    return (both + 1) / ((one + two).sum(-1) - both + 1)


def disendiff_loss(modifiers: Sequence[Tensor], classes: Sequence[Tensor], *, sigma: float = 0.5) -> Tensor:
    """Claim: a new concept's word that looks where its class does, and classes that look at different places, keep two
    concepts of one picture apart.

    Bind: sum over concepts of 1 - IoU(stop-gradient(c), m); separate: + the mean over pairs of IoU(c_i, c_j). m: the
    modifier's map [n] scaled from 0 to 1, then smoothed by a 3 x 3 Gaussian; c: the class word's likewise, and squared
    (suppress). Maps as `word_maps` gives them.
    Source: arXiv 2403.18551, Monalissaa/DisenDiff `src/model.py`, which is followed (bind is a sum, separate a mean).
    The IoU's 1 is of the order of one patch, and a map does not overlap wholly with itself unless it is 0 and 1.
    """
    if len(modifiers) != len(classes) or not classes:
        raise ValueError(f"disendiff_loss: {len(modifiers)} modifiers of {len(classes)} classes: want one for each")
    quiet = [smoothed(scaled_map(own), sigma) ** 2 for own in classes]
    told = [smoothed(scaled_map(own), sigma) for own in modifiers]
    bind = torch.stack([1 - soft_overlap(c.detach(), m) for c, m in zip(quiet, told, strict=True)]).sum()
    apart = [soft_overlap(a, b) for i, a in enumerate(quiet) for b in quiet[:i]]
    return bind + torch.stack(apart).mean() if apart else bind


class DisenDiff:
    """The velocity's error + weight * `disendiff_loss` of each picture, on average over the pictures."""

    def __init__(self, album: Album, weight: float):
        self.album, self.weight = album, weight

    def captions(self, step: int, rows: Sequence[int]) -> list[str]:
        return [self.album.captions[row] for row in rows]

    def __call__(self, step: int, own: Pass) -> Tensor:
        plain = own.error[: len(own.rows)].mean()
        if not self.weight:
            return plain
        losses = []
        for row in range(len(own.rows)):
            places = [place for word in self.album.words if (place := own.place(row, word)) is not None]
            maps = own.maps[row]
            losses.append(disendiff_loss([maps[:, i] for i in places], [maps[:, i + 1] for i in places]))
        return plain + self.weight * torch.stack(losses).mean()


@personalising(
    "disendiff",
    title="new words look where their class does, classes look apart",
    source="arXiv 2403.18551",
    trains=("k_proj", "v_proj"),
    prior=True,
    rate=3e-3,
    neutral={"weight": 0.0},
)
def open_disendiff(model: Any, album: Album, *, weight: float = 0.01) -> Lesson:
    """A subject is a modifier, and the word behind it in the caption is its class ("mine 3"). weight: of the loss on
    maps, 0.01 as released. Learns the subjects' words, keys and values of cross attention, as Custom Diffusion does."""
    for name, caption in zip(album.names or album.captions, album.captions, strict=True):
        said = caption.split()
        for word in album.words:
            if word in said and (said[-1] == word or said[said.index(word) + 1] in album.words):
                raise ValueError(
                    f"disendiff: {name}: no class follows the subject {word!r} in {caption!r}: say such as '{word} 3'"
                )
    return DisenDiff(album, weight)
