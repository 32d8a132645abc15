"""AttenCraft: masks of several concepts from the model's own attention, and training inside of them.

Shapes: k concepts, n patches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from manyheads.steer.diffusion.word_maps import scaled_map
from manyheads.steer.personal.form import Lesson, personalising
from manyheads.steer.personal.mcpl import masked_velocity_loss, on_pixels
from manyheads.steer.personal.passes import Pass, draw_noise, noisy
from manyheads.steer.personal.subjects import Album

# The noisiest picture that masks are first taken from, and how many; how often masks are taken anew, in steps.
EARLY, NOISES, ANEW = 0.5, 8, 20


def claims(cross: Tensor, affinity: Tensor, *, power: float = 2.0) -> Tensor:
    """Word maps [k, n] made sharp and spread along what patches see alike, [k, n] from 0 to 1.

    A' scaled(cross^power), scaled again; A' = scaled(scaled(A)^4), the power that of a matrix, A self attention
    [n, n], scaled over all of it."""
    if cross.shape[1:] != affinity.shape[1:] or affinity.shape[0] != affinity.shape[1]:
        raise ValueError(f"concept_masks: maps {tuple(cross.shape)} and affinity {tuple(affinity.shape)} do not fit")
    spread = torch.linalg.matrix_power(scaled_map(affinity.flatten()).view_as(affinity), 4)
    spread = scaled_map(spread.flatten()).view_as(affinity)
    return scaled_map(scaled_map(cross**power) @ spread.T)


def concept_masks(cross: Tensor, affinity: Tensor, *, power: float = 2.0, threshold: float = 0.1) -> Tensor:
    """Masks of concepts, [k, n] bool, of a picture: where a concept's claim is above every other's by `threshold`.

    cross: [k, n], one map per concept (and one of the word that begins every caption, for the background); affinity:
    self attention [n, n]. Source: arXiv 2405.17965, junjie-shentu/AttenCraft `train.py`, whose order of steps and whose
    strict margin are followed; resizing to 32 x 32 is left out, as the maps here are of one size.
    """
    claimed = claims(cross, affinity, power=power)
    best = claimed.topk(min(2, len(claimed)), 0).values
    rival = torch.where(claimed == best[0], best[-1] if len(claimed) > 1 else torch.zeros_like(best[0]), best[0])
    return claimed - rival > threshold


def jensen_shannon(one: Tensor, two: Tensor) -> Tensor:
    """Between the softmaxes of two maps [..., n], in nats; softmaxes of maps from 0 to 1 are never far apart, as
    released."""
    p, q = one.softmax(-1), two.softmax(-1)
    middle = (p + q) / 2
    return ((p * p.log() + q * q.log()) / 2 - middle * middle.log()).sum(-1)


def similarity(one: Tensor, two: Tensor, window: int = 7) -> float:
    """Structural similarity of two maps [n] from 0 to 1, uniform windows wholly inside: skimage's for data_range 1."""
    side = math.isqrt(one.numel())
    window, a, b = min(window, side), one.double().view(1, 1, side, side), two.double().view(1, 1, side, side)
    mean_a, mean_b = avg_pool2d(a, window, 1), avg_pool2d(b, window, 1)
    unbiased = window**2 / (window**2 - 1)
    spread_a, spread_b = (
        unbiased * (avg_pool2d(own**2, window, 1) - mean**2) for own, mean in ((a, mean_a), (b, mean_b))
    )
    both = unbiased * (avg_pool2d(a * b, window, 1) - mean_a * mean_b)
    first, second = 0.01**2, 0.03**2
    found = (2 * mean_a * mean_b + first) * (2 * both + second)
    return float((found / ((mean_a**2 + mean_b**2 + first) * (spread_a + spread_b + second))).mean())


class AttenCraft:
    """Claim: concepts learnt inside of masks that the model's own attention draws do not mix.

    mean(M (v - v')^2) + weight * mean over the told concepts and the background of JS(their maps, their masks), M the
    union of the told concepts' masks. Each picture is told one of its concepts, or all of them, as often: parts of its
    caption between "and". Masks: of the model before training at little noise; every 20 steps anew from that step's
    pass, kept where no mask is empty and each is as it was by an SSIM of `alike`.
    Source: arXiv 2405.17965, junjie-shentu/AttenCraft `train.py`. Different: the first maps are the mean over
    eight noises, where there they are of one (one says too little here); masks stay patches where there they are
    enlarged by bicubic interpolation; every picture has masks of its own, where there it is one picture.
    """

    def __init__(self, model: Any, album: Album, weight: float, masked: bool, subsets: bool, **how: float):
        self.album, self.weight, self.masked, self.subsets = album, weight, masked, subsets
        self.alike, self.threshold = how["alike"], how["threshold"]
        self.masks: dict[int, Tensor] = {}
        if masked or weight:
            self._begin(model)

    def told_of(self, row: int) -> list[str]:
        return [word for word in self.album.words if word in self.album.captions[row].split()]

    @torch.no_grad()
    def _begin(self, model: Any) -> None:
        for row in range(len(self.album.pictures)):
            rows = [row] * NOISES
            noise, _ = draw_noise(model, NOISES, row)
            times = torch.linspace(0, EARLY, NOISES + 1, device=noise.device, dtype=noise.dtype)[1:]
            own = noisy(model, self.album.pictures[rows], noise, times, [self.album.captions[row]] * NOISES, rows)
            masks = self._found(own, range(NOISES))
            if not bool(masks[:-1].any(1).all()):
                lost = self.told_of(row)[int((~masks[:-1].any(1)).nonzero()[0, 0])]
                raise ValueError(
                    f"attencraft: {(self.album.names or self.album.captions)[row]}: nothing in the picture is claimed "
                    f"by {lost!r} by {self.threshold}: give a smaller threshold, or a word to begin as that is nearer"
                )
            self.masks[row] = masks

    def _found(self, own: Pass, rows: Sequence[int]) -> Tensor:
        """Of the concepts of the rows, which are of one picture, in order, and last of the background."""
        words = self.told_of(own.rows[rows[0]])
        places = [own.place(rows[0], word) for word in words]
        maps = own.maps[list(rows)].mean(0).T[[*(place for place in places if place is not None), 0]]
        return concept_masks(maps, own.affinity[list(rows)].mean(0), threshold=self.threshold)

    def captions(self, step: int, rows: Sequence[int]) -> list[str]:
        whole = [self.album.captions[row] for row in rows]
        if not self.subsets or step % ANEW == 0:
            return whole
        rng = random.Random(f"attencraft {step}")
        return [
            self._part(caption, rng.choice([None, *self.told_of(row)]))
            for caption, row in zip(whole, rows, strict=True)
        ]

    def _part(self, caption: str, word: str | None) -> str:
        parts = caption.split(" and ")
        others = [own for own in self.album.words if own != word]
        alone = [part for part in parts if word in part.split() and not any(own in part.split() for own in others)]
        return alone[0] if alone else caption

    def __call__(self, step: int, own: Pass) -> Tensor:
        error = own.error[: len(own.rows)]
        if not self.masks:
            return error.mean()
        if step and step % ANEW == 0:
            self._anew(own)
        inside, losses = [], []
        for row, picture in enumerate(own.rows):
            words, masks = self.told_of(picture), self.masks[picture]
            told = [i for i, word in enumerate(words) if own.place(row, word) is not None]
            inside.append(masks[told].any(0))
            maps = torch.stack([*(own.maps[row, :, own.place(row, words[i])] for i in told), own.maps[row, :, 0]])
            losses.append(jensen_shannon(scaled_map(maps), masks[[*told, -1]].to(maps.dtype)).mean())
        pixels = on_pixels(torch.stack(inside), error.shape[-1])
        denoised = masked_velocity_loss(own.velocity[: len(inside)], own.wanted[: len(inside)], pixels)
        return (denoised if self.masked else error.mean()) + self.weight * torch.stack(losses).mean()

    @torch.no_grad()
    def _anew(self, own: Pass) -> None:
        for row, picture in enumerate(own.rows):
            found, before = self._found(own, [row]), self.masks[picture]
            alike = [similarity(a, b) for a, b in zip(found[:-1], before[:-1], strict=True)]
            if bool(found.any(1).all()) and min(alike) >= self.alike:
                self.masks[picture] = found


@personalising(
    "attencraft",
    title="masks from the model's own attention, training inside of them, concepts told in turn",
    source="arXiv 2405.17965",
    trains=("k_proj", "v_proj"),
    prior=True,
    rate=3e-3,
    neutral={"weight": 0.0, "masked": False, "subsets": False},
)
def open_attencraft(
    model: Any,
    album: Album,
    *,
    weight: float = 1.0,
    masked: bool = True,
    subsets: bool = True,
    alike: float = 0.8,
    threshold: float = 0.1,
) -> Lesson:
    """A subject is a thing's word. weight: of maps against masks. masked: the velocity's error inside of the masks
    alone. subsets: captions of one concept in turn (parts of a caption between "and"). alike, threshold: of the masks,
    as released. Learns the subjects' words, keys and values of cross attention."""
    return AttenCraft(model, album, weight, masked, subsets, alike=alike, threshold=threshold)
