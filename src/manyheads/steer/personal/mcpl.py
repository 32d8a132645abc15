"""Multi-concept prompt learning: several words learnt from whole pictures, told apart by contrast.

Shapes: b pictures, k concepts, n patches, v views of the concepts, e width of the words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from manyheads.steer.personal.form import Lesson, personalising
from manyheads.steer.personal.passes import Pass
from manyheads.steer.personal.subjects import Album


def union_mask(maps: Tensor, threshold: float = 0.3) -> Tensor:
    """Where the sum of the concepts' maps [b, k, n] is above the threshold times its greatest value: [b, n].

    MCPL's AttnMask (arXiv 2310.12274, AstraZeneca/MCPL `src/p2p/p2p_ldm_utils.py`). Different from the released code,
    which adds the first picture's mask to every other's, and whose recipes put the maps through two softmaxes over
    words first: of maps from 0 to 1 that leaves no value below 1/e of the greatest, so that nothing is masked. A
    threshold below 0 takes everything."""
    whole = maps.sum(1)
    return whole > threshold * whole.amax(-1, keepdim=True)


def masked_velocity_loss(velocity: Tensor, wanted: Tensor, inside: Tensor) -> Tensor:
    """Claim: concepts learnt from the places that their words look at do not learn the background.

    Squared error of [b, c, height, width] where `inside` [b, height, width] is True, and 0 elsewhere, on average over
    all places: velocity and target are both masked, and nothing is divided by the mask's size. With True everywhere it
    is the plain loss. Source: arXiv 2310.12274 (MCPL's AttnMask, with `union_mask`); AttenCraft (2405.17965) and
    DreamText (2405.14701) use it with masks of theirs.
    """
    if not bool(inside.any()):
        raise ValueError("masked_velocity_loss: the mask holds nothing")
    return ((velocity - wanted) ** 2 * inside[:, None].to(velocity.dtype)).mean()


def on_pixels(masks: Tensor, size: int) -> Tensor:
    """Masks [b, n] of patches on the pixels of a picture, [b, size, size]."""
    side = math.isqrt(masks.shape[-1])
    return masks.unflatten(-1, (side, side)).repeat_interleave(size // side, 1).repeat_interleave(size // side, 2)


def contrastive_loss(views: Tensor, temperature: float = 0.2) -> Tensor:
    """PromptCL, InfoNCE between concepts: of every view [v, k, e] the positive is the same concept in the view before
    it, all other rows are negatives: mean of -cos / T + logsumexp over the others of cos / T.

    Views are the rows of a batch, and with adjectives bound those of their adjectives. Source: arXiv 2310.12274,
    AstraZeneca/MCPL `ldm/models/diffusion/ddpm.py`, whose comment (the positive is k rows away) is followed: the code
    moves by v rows, which is another concept unless v is a multiple of k.
    """
    count, concepts = views.shape[:2]
    if count < 2 or concepts < 2:
        raise ValueError(f"contrastive_loss: {count} views of {concepts} concepts: want two of two at least")
    rows = normalize(views.flatten(0, 1), dim=-1)
    place = torch.arange(len(rows), device=rows.device)
    alike = (rows @ rows.T / temperature).masked_fill(place[:, None] == place, -math.inf)
    return (alike.logsumexp(-1) - alike[place, place - concepts]).mean()


class MCPL:
    """mean(M (v - v')^2) + scale * PromptCL, M the union of the words' maps where `masked`.

    Words as cross attention reads them: a word's vector and that of its place."""

    def __init__(self, model: Any, album: Album, scale: float, masked: bool, adjectives: Sequence[str], **how: float):
        self.model, self.album, self.scale, self.masked, self.adjectives = model, album, scale, masked, adjectives
        self.temperature, self.threshold = how["temperature"], how["threshold"]

    def captions(self, step: int, rows: Sequence[int]) -> list[str]:
        return [self.album.captions[row] for row in rows]

    def __call__(self, step: int, own: Pass) -> Tensor:
        error = own.error[: len(own.rows)]
        loss = error.mean()
        if self.masked:
            inside = torch.cat([union_mask(self._maps(own, row), self.threshold) for row in range(len(own.rows))])
            pixels = on_pixels(inside, error.shape[-1])
            loss = masked_velocity_loss(own.velocity[: len(pixels)], own.wanted[: len(pixels)], pixels)
        if not self.scale:
            return loss
        views = self._views(own, self.album.words)
        views = torch.cat([views, self._views(own, self.adjectives)]) if self.adjectives else views
        return loss + self.scale * contrastive_loss(views, self.temperature) if len(views) > 1 else loss

    def _maps(self, own: Pass, row: int) -> Tensor:
        words = [*self.album.words, *self.adjectives]
        return torch.stack([found for word in words if (found := own.word(row, word)) is not None])[None]

    def _views(self, own: Pass, words: Sequence[str]) -> Tensor:
        """[v, k, e] of the rows whose captions have all of the words."""
        places = [[own.place(row, word) for word in words] for row in range(len(own.rows))]
        whole = [row for row, found in enumerate(places) if None not in found]
        if not whole:
            return own.told[:0, : len(words)]
        return own.told[whole][torch.arange(len(whole))[:, None], torch.tensor([places[row] for row in whole])]


@personalising(
    "mcpl",
    title="words alone are learnt, inside of what they look at, set apart by contrast, bound to adjectives",
    source="arXiv 2310.12274",
    trains=(),
    prior=False,
    rate=5e-2,
    neutral={"scale": 0.0, "masked": False},
)
def open_mcpl(
    model: Any,
    album: Album,
    *,
    scale: float = 0.0005,
    temperature: float = 0.2,
    masked: bool = True,
    threshold: float = 0.3,
    adjectives: str = "",
) -> Lesson:
    """A subject is a thing's word. scale, temperature: of the contrast between the subjects, which wants two or more.
    masked: the velocity's error where the words look alone, above threshold of the greatest. adjectives: words of the
    captions, one for each subject in their order, that are bound to them. Learns the subjects' words alone."""
    bound = [word.strip().lower() for word in adjectives.split(",") if word.strip()]
    if scale and len(album.words) < 2:
        raise ValueError("mcpl sets concepts apart, and there is one subject: give two, or mcpl[scale=0]")
    if bound and len(bound) != len(album.words):
        raise ValueError(f"mcpl: {len(bound)} adjectives of {len(album.words)} subjects: want one for each, in order")
    for name, caption in zip(album.names or album.captions, album.captions, strict=True):
        lost = [
            a
            for a, word in zip(bound, album.words, strict=False)
            if word in caption.split() and a not in caption.split()
        ]
        if lost:
            raise ValueError(
                f"mcpl: {name}: the caption {caption!r} has no {lost[0]!r}, the adjective of a subject in it"
            )
    return MCPL(model, album, scale, masked, bound, temperature=temperature, threshold=threshold)
