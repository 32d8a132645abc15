"""Tokens that hold NaN or infinity: found at the price of one sum, and kept from what may not read them.

A weight of zero does not hide them (0 * NaN is NaN), so that a mask alone lets them through, from padding into real
tokens and from the future into the past.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max  # the place of the first broken token of a row that has none


def broken_tokens(x: Tensor) -> Tensor | None:
    """[..., n] True where a token of x [..., n, features] holds NaN or infinity; None where none does, as far as that
    can be asked at once: on another device the answer would stop the queue, and while a graph is traced there is
    none, so that there the tensor comes without a question."""
    if type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling():
        try:
            if math.isfinite(x.sum().item()):
                return None
        except RuntimeError:  # inside vmap a tensor has no one value
            pass
        else:
            broken = ~x.isfinite().all(-1)
            return broken if bool(broken.any()) else None
    return ~x.isfinite().all(-1)


def blanked(x: Tensor, tokens: Tensor) -> Tensor:
    """x with zeros for these tokens [..., n]."""
    return x.masked_fill(tokens[..., None], 0.0)


def first_of(tokens: Tensor, start: int) -> Tensor:
    """[batch]: the place of the first True of each row [batch, n], counted from `start`; NEVER where there is none."""
    place = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    return torch.where(tokens, place, NEVER).amin(1)
