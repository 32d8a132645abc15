"""Maps of words over a picture's patches as training losses and masks see them.

Shapes: h heads, n patches (a square), m words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from manyheads.hosts.taps import record


def word_maps(model: Any, pictures: Tensor, time: float, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross attention averaged over heads and layers, [b, n, m]; gradients reach the model."""
    with record(model, kind="cross") as calls:
        model.velocities(pictures, time, ids, mask)
        return torch.stack([call.weights().mean(1) for call in calls]).mean(0)


def scaled_map(own: Tensor) -> Tensor:
    """[..., n] from 0 to 1 over its patches; a map that is the same everywhere becomes 0."""
    low, high = own.amin(-1, keepdim=True), own.amax(-1, keepdim=True)
    return (own - low) / (high - low).clamp_min(torch.finfo(own.dtype).tiny)


def smoothed(own: Tensor, sigma: float) -> Tensor:
    """[..., n] by a 3 x 3 Gaussian, edges reflected."""
    side = math.isqrt(own.shape[-1])
    if side * side != own.shape[-1] or side < 2:
        raise ValueError(f"smoothed: {own.shape[-1]} patches are no square grid of 2 at least")
    line = torch.exp(-(torch.arange(-1, 2, dtype=own.dtype, device=own.device) ** 2) / (2 * sigma**2))
    kernel = line[:, None] * line / line.sum() ** 2
    grid = pad(own.reshape(-1, 1, side, side), (1, 1, 1, 1), mode="reflect")
    return conv2d(grid, kernel[None, None]).reshape(own.shape)


def soft_overlap(one: Tensor, two: Tensor) -> Tensor:
    """(sum ab + 1) / (sum (a + b) - sum ab + 1), as DisenDiff counts it; of equal maps of 0 and 1 it is 1."""
    both = (one * two).sum(-1)
    return (both + 1) / ((one + two).sum(-1) - both + 1)


def disendiff_loss(modifiers: Sequence[Tensor], classes: Sequence[Tensor], *, sigma: float = 0.5) -> Tensor:
    """Claim: a new concept's word that looks where its class does, and classes that look at different places, keep two
    concepts of one picture apart.

    Bind: mean over concepts of 1 - IoU(stop-gradient(c), m); separate: + the sum over pairs of IoU(c_i, c_j). m: the
    modifier's map [n] from 0 to 1, c: the class word's, smoothed by a 3 x 3 Gaussian and squared (suppress). Maps as
    `word_maps` gives them.
    Source: arXiv 2403.18551, Monalissaa/DisenDiff `src/model.py`. The IoU's 1 is of the order of one patch. Zero for
    maps that agree and concepts of which there is one.
    """
    if len(modifiers) != len(classes) or not classes:
        raise ValueError(f"disendiff_loss: {len(modifiers)} modifiers of {len(classes)} classes: want one for each")
    quiet = [scaled_map(smoothed(scaled_map(own), sigma) ** 2) for own in classes]
    bind = [1 - soft_overlap(c.detach(), scaled_map(m)) for c, m in zip(quiet, modifiers, strict=True)]
    apart = [soft_overlap(a, b) for i, a in enumerate(quiet) for b in quiet[:i]]
    return torch.stack(bind).mean() + sum(apart, torch.zeros((), dtype=bind[0].dtype, device=bind[0].device))


def concept_masks(cross: Tensor, affinity: Tensor, *, power: float = 2.0, threshold: float = 0.1) -> Tensor:
    """Masks of concepts, [k, n] bool, of a picture: word maps made sharp, spread along what patches see alike, and each
    patch given to the concept that claims it most, if by `threshold` at least.

    cross: [k, n], one map per concept; affinity: self attention [n, n]. M = affinity' (cross / max)^power, affinity'
    from 0 to 1 in each row; scaled from 0 to 1 per concept.
    Source: arXiv 2405.17965, junjie-shentu/AttenCraft `train.py`. Its masked loss, its draw of concepts, and the update
    while SSIM < 0.8 are the trainer's.
    """
    if cross.shape[1:] != affinity.shape[1:] or affinity.shape[0] != affinity.shape[1]:
        raise ValueError(f"concept_masks: maps {tuple(cross.shape)} and affinity {tuple(affinity.shape)} do not fit")
    sharp = (cross / cross.amax(-1, keepdim=True).clamp_min(torch.finfo(cross.dtype).tiny)) ** power
    claimed = scaled_map(sharp @ scaled_map(affinity).T)
    best = torch.nn.functional.one_hot(claimed.argmax(0), len(cross)).T.bool()
    return best & (claimed >= threshold)


def masked_velocity_loss(velocity: Tensor, wanted: Tensor, inside: Tensor) -> Tensor:
    """Mean squared error where `inside` [b, height, width] is True, as AttenCraft and MCPL's AttnMask (arXiv
    2310.12274: inside the union of the concepts' maps above a threshold) train; with True everywhere the plain loss."""
    if not bool(inside.any()):
        raise ValueError("masked_velocity_loss: the mask holds nothing")
    error = (velocity - wanted) ** 2
    weight = inside[:, None].to(error.dtype).expand_as(error)
    return (error * weight).sum() / weight.sum()


def character_loss(maps: Tensor, *, sigma: float = 1.0, deviations: float = 2.0) -> Tensor:
    """Claim: characters that are attended to where they are drawn, and only there, are drawn right.

    Mean over characters of max outside - max inside of their own mask; mask = map > mean + deviations * std, taken
    anew from the maps [k, n] as they are now, smoothed by a 3 x 3 Gaussian. The mask carries no gradient. A map that is
    the same everywhere has no mask and counts nothing.
    Source: arXiv 2405.14701, CodeGoat24/DreamText `sgm/modules/diffusionmodules/loss.py`. The Gaussian's sigma is not
    named there; the loss of noise inside of the masks is `masked_velocity_loss`.
    """
    smooth = smoothed(maps, sigma)
    inside = smooth > smooth.mean(-1, keepdim=True) + deviations * smooth.std(-1, keepdim=True)
    real = inside.any(-1)
    if not bool(real.any()):
        return smooth.sum() * 0
    outer = smooth.masked_fill(inside, -math.inf).amax(-1)
    inner = smooth.masked_fill(~inside, -math.inf).amax(-1)
    return (outer - inner)[real].mean()
