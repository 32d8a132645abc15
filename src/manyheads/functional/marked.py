"""Tokens of several kinds in one sequence, told apart by the last features of x."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_kinds(x: Tensor, kinds: int) -> tuple[Tensor, Tensor]:
    """x [b, n, e] whose last `kinds` features say of which kind a token is -> its other features [b, n, e - kinds] and
    the kind [b, n], the largest of those features; no gradient."""
    return x[..., :-kinds], x[..., -kinds:].argmax(-1)


def unmarked(output: Tensor, kinds: int) -> Tensor:
    """Zeros where x has its marks, so that a residual connection leaves them as they are."""
    return F.pad(output, (0, kinds))


def content_width(name: str, dim: int, heads: int, kinds: int, of_what: str) -> tuple[int, int]:
    """The features that are not marks, dim - kinds, and the largest multiple of heads that is no more: what heads
    share. ValueError where there is none."""
    width = dim - kinds
    if width < heads:
        raise ValueError(
            f"{name}: dim={dim} holds {kinds} features for {of_what} and {max(width, 0)} others; want at least "
            f"heads={heads} others"
        )
    return width, width // heads * heads
