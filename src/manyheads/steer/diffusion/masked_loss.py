"""Multi-concept prompt learning: the loss inside of what the concepts' words look at."""

from __future__ import annotations

from torch import Tensor

from manyheads.steer.diffusion.word_maps import scaled_map


def union_mask(maps: Tensor, threshold: float = 0.3) -> Tensor:
    """Where any of the concepts' maps [b, k, n], each scaled from 0 to 1, is above the threshold: [b, n]. MCPL's
    AttnMask (arXiv 2310.12274); the scaling and the threshold's value are not in what was at hand, and are decided
    here. A threshold below 0 takes everything."""
    return (scaled_map(maps) > threshold).any(1)


def masked_velocity_loss(velocity: Tensor, wanted: Tensor, inside: Tensor) -> Tensor:
    """Claim: concepts learnt from the places that their words look at do not learn the background.

    Mean squared error of [b, c, height, width] where `inside` [b, height, width] is True; with True everywhere it is
    the plain loss. Source: arXiv 2310.12274 (MCPL's AttnMask, with `union_mask`); AttenCraft (2405.17965) and DreamText
    (2405.14701) use it with masks of theirs. MCPL's contrastive loss of prompts is not here: its details were not at
    hand.
    """
    if not bool(inside.any()):
        raise ValueError("masked_velocity_loss: the mask holds nothing")
    error = (velocity - wanted) ** 2
    weight = inside[:, None].to(error.dtype).expand_as(error)
    return (error * weight).sum() / weight.sum()
