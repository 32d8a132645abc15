"""Tokens of several kinds in one sequence, of which a call is told beside x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


def checked_kinds(
    name: str, given: Any, x: Tensor, padding: Tensor | None, kinds: int | None = None, *, what: str = "token_kinds"
) -> Tensor:
    """The kind of each token of x [b, n, e] as int64 [b, n]: 0 to kinds - 1, or any from 0 on. Padding of a kind
    that there is not reads as kind 0; else it keeps its own, as a later pass may call it real. ValueError for another
    shape, type, device, or a kind of a real token that there is not."""
    whole = isinstance(given, Tensor) and given.dtype in _WHOLE and given.device == x.device
    if not whole or given.shape != x.shape[:2]:
        found = f"{given.dtype} {list(given.shape)} on {given.device}" if isinstance(given, Tensor) else repr(given)
        raise ValueError(f"{name}: {what} are {found[:80]}; want integers {list(x.shape[:2])} on {x.device}")
    kind = given.long()
    if padding is not None:
        strange = (kind < 0) if kinds is None else (kind < 0) | (kind >= kinds)
        kind = kind.masked_fill(strange & ~padding, 0)
    if torch.compiler.is_compiling() or kind.is_meta:
        return kind
    low, high = int(kind.min()), int(kind.max())
    if low < 0 or (kinds is not None and high >= kinds):
        wanted = "0 or more" if kinds is None else f"0 to {kinds - 1}, as it was built for {kinds}"
        raise ValueError(f"{name}: {what} go from {low} to {high}; want {wanted}")
    return kind
