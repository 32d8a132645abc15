"""DreamText: characters attended to where they are drawn, by masks taken anew at every step.

Shapes: k characters, n patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.steer.diffusion.word_maps import smoothed
from manyheads.steer.personal.form import Lesson, personalising
from manyheads.steer.personal.mcpl import on_pixels
from manyheads.steer.personal.passes import Pass
from manyheads.steer.personal.subjects import Album


def character_masks(maps: Tensor, *, sigma: float = 1.0, deviations: float = 2.0) -> tuple[Tensor, Tensor]:
    """Maps [k, n] smoothed by a 3 x 3 Gaussian, and where each is above its mean + deviations * std, which carries no
    gradient."""
    smooth = smoothed(maps, sigma)
    return smooth, smooth > smooth.mean(-1, keepdim=True) + deviations * smooth.std(-1, keepdim=True)


def character_loss(maps: Tensor, *, sigma: float = 1.0, deviations: float = 2.0) -> Tensor:
    """Claim: characters that are attended to where they are drawn, and only there, are drawn right.

    Mean over characters of max outside - max inside of their own mask, taken anew from the maps [k, n] as they are now
    (`character_masks`). A map that is the same everywhere has no mask and counts nothing.
    Source: arXiv 2405.14701, CodeGoat24/DreamText `sgm/modules/diffusionmodules/loss.py`, sigma of
    `configs/train/textdesign_sd_2.yaml`. Its further loss, of these masks against true ones, is of masks without
    gradient and teaches nothing: left out.
    """
    smooth, inside = character_masks(maps, sigma=sigma, deviations=deviations)
    real = inside.any(-1)
    if not bool(real.any()):
        return smooth.sum() * 0
    outer = smooth.masked_fill(inside, -math.inf).amax(-1)
    inner = smooth.masked_fill(~inside, -math.inf).amax(-1)
    return (outer - inner)[real].mean()


class DreamText:
    """mean(e) + weight * `character_loss` + masked * mean over characters of mean(M_k e), e the velocity's squared
    error and M_k the character's mask; on average over the pictures. The masks are what the last step left, and the
    characters' words and the attention to them both learn from them: one optimiser has both, as released."""

    def __init__(self, album: Album, weight: float, masked: float, deviations: float):
        self.album, self.weight, self.masked, self.deviations = album, weight, masked, deviations

    def captions(self, step: int, rows: Sequence[int]) -> list[str]:
        return [self.album.captions[row] for row in rows]

    def __call__(self, step: int, own: Pass) -> Tensor:
        error = own.error[: len(own.rows)]
        loss = error.mean()
        if not self.weight and not self.masked:
            return loss
        on_maps, inside_loss = [], []
        for row in range(len(own.rows)):
            maps = torch.stack([found for word in self.album.words if (found := own.word(row, word)) is not None])
            on_maps.append(character_loss(maps, deviations=self.deviations))
            masks = character_masks(maps, deviations=self.deviations)[1]
            inside = on_pixels(masks, error.shape[-1]).to(error.dtype)
            inside_loss.append((inside[:, None] * error[row]).mean())
        return loss + self.weight * torch.stack(on_maps).mean() + self.masked * torch.stack(inside_loss).mean()


@personalising(
    "dreamtext",
    title="characters attended to where they are drawn, by masks taken anew at every step",
    source="arXiv 2405.14701",
    trains=("q_proj", "k_proj", "v_proj", "o_proj"),
    prior=False,
    rate=2e-3,
    neutral={"weight": 0.0, "masked": 0.0},
)
def open_dreamtext(
    model: Any, album: Album, *, weight: float = 0.01, masked: float = 0.01, deviations: float = 2.0
) -> Lesson:
    """Subjects are characters, such as the digits of a caption (--subject 3 --subject 7). weight: of the loss on their
    maps; masked: of the velocity's error inside of their masks; deviations: of the masks; all as released. Learns
    the characters' words and all of cross attention. Its recogniser of text and its second encoder are not here."""
    return DreamText(album, weight, masked, deviations)
