"""From one column per distance to one column per key, without a gather (Music Transformer, arXiv:1809.04281)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def skew(by_distance: Tensor, keys: int) -> Tensor:
    """by_distance [.., n, w] -> [.., n, keys]: entry (i, j) is entry (i, j + n - 1 - i) of by_distance.

    Query i stands at key m - n + i, so that its column m - 1 is distance zero, columns before it are earlier keys and
    columns after it later ones. w = m is enough where later keys are masked: they come out as numbers without meaning.
    w = n + m - 1 holds all distances. One column of padding and another reading of the rows do it.
    """
    n, w = by_distance.shape[-2:]
    flat = F.pad(by_distance, (0, 1)).flatten(-2)
    return flat[..., n - 1 : n - 1 + n * w].unflatten(-1, (n, w))[..., :keys]


def unskew(by_key: Tensor, keys: int) -> Tensor:
    """The way back: by_key [.., n, keys] -> [.., n, n + keys - 1], whose entry (i, j + n - 1 - i) is entry (i, j) of
    by_key, and zero where no key stands."""
    n = by_key.shape[-2]
    flat = F.pad(by_key, (0, n - 1)).flatten(-2)
    return F.pad(flat, (n - 1, 1)).unflatten(-1, (n, n + keys))[..., :-1]
