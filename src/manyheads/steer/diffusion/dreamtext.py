"""DreamText: characters attended to where they are drawn, by masks taken anew at every step."""

from __future__ import annotations

import math

from torch import Tensor

from manyheads.steer.diffusion.word_maps import smoothed


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
