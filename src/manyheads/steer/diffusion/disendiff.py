"""DisenDiff: the words of new concepts bound to their classes, and classes kept apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyheads.steer.diffusion.word_maps import scaled_map, smoothed


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
