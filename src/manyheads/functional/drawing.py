"""So many of a set, the highest or any: for masks that drop a share of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def highest(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` highest scores of each row: scores and among [..., n], count [...] -> boolean [..., n], a subset of
    among (all of it where it has no more). Ties go to the earlier token."""
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(-1) < count[..., None]) & among


def draw(among: Tensor, count: Tensor) -> Tensor:
    """`count` of each row's set, each subset as likely as another."""
    return highest(torch.rand(among.shape, device=among.device), among, count)


def share(among: Tensor, ratio: float) -> Tensor:
    """ceil(ratio x the size of the set), [...]; a hair is taken off first, since 0.1 x 30 is above 3 as a float."""
    return (among.sum(-1) * ratio - 1e-6).ceil().long().clamp_min(0)
