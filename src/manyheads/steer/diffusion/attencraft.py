"""AttenCraft: masks of several concepts from one pass over a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.steer.diffusion.word_maps import scaled_map


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
