"""Convolutions over the sequence whose taps are weights: masks, the rows a state keeps, and the band they are.

b batch, n tokens, h heads, K taps. Tap k of token t falls on token t - left + k.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.inner import Across
from manyheads.state import State


def surround(
    u: Tensor, real: Tensor, left: int, right: int, state: State | None, across: Across | None = None
) -> tuple[Tensor, Tensor]:
    """u [b, n, e] and what is real of it [b, n], with the rows before and after that the outer taps fall on: zeros, or
    what the state kept of the passes before (right must be 0 then), or those of other processes (causal: the same).
    The state is advanced."""
    if across is not None:
        # What is real is asked for by dense masks and weights alone, which a sequence over several processes has not.
        return torch.cat([across.before(u, left), u], 1), F.pad(real, (left, 0))
    if state is None:
        return F.pad(u, (0, 0, left, right)), F.pad(real, (left, right))
    held = state.fixed if state.fixed else {"rows": u[:, :0], "real": real[:, :0]}
    missing = left - held["rows"].shape[1]
    rows = torch.cat([F.pad(held["rows"], (0, 0, missing, 0)), u], 1)
    real = torch.cat([F.pad(held["real"], (missing, 0)), real], 1)
    # Copies: a view would keep the whole pass alive.
    state.fixed["rows"] = rows[:, u.shape[1] :].clone()
    state.fixed["real"] = real[:, u.shape[1] :].clone()
    state.advance(u.shape[1])
    return rows, real


def tap_columns(n: int, seen: int, left: int, taps: int, device: torch.device) -> Tensor:
    """The key that each tap of each token falls on, [n, K]; below 0 or beyond the last where there is none."""
    t = torch.arange(seen, seen + n, device=device)[:, None]
    return t - left + torch.arange(taps, device=device)


def dense_at_taps(dense: Tensor, columns: Tensor) -> Tensor:
    """A dense mask [b, 1 or h, n, m] where the taps fall, as [b, n, 1 or h, K]."""
    columns = columns.clamp(0, dense.shape[-1] - 1)
    return dense.gather(-1, columns.expand(*dense.shape[:2], -1, -1)).transpose(1, 2)


def band_matrix(taps: Tensor, columns: Tensor, keys: int) -> Tensor:
    """taps [b, n, h, K], zero where they fall on nothing -> the matrix [b, h, n, keys]."""
    b, n, h, _ = taps.shape
    empty = taps.new_zeros(b, h, n, keys)
    return empty.scatter_add(-1, columns.clamp(0, keys - 1).expand(b, h, -1, -1), taps.transpose(1, 2))
