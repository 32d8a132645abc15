"""Maps of words over a picture's patches, as training losses and masks see them.

Shapes: b pictures, h heads, n patches (a square), m words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from manyheads.hosts.taps import record


def word_maps(
    model: Any, pictures: Tensor, time: float, ids: Tensor, mask: Tensor, *, side: int | None = None
) -> Tensor:
    """Cross attention averaged over heads and layers, [b, n, m]; gradients reach the model. side: of the maps that are
    taken, of a model that attends at several sizes (papers take those at 16 of a UNet's 64); ValueError without."""
    with record(model, kind="cross") as calls:
        model.velocities(pictures, time, ids, mask)
    sides = [math.isqrt(call.query.shape[2]) for call in calls]
    if (side is None and len(set(sides)) > 1) or (side is not None and side not in sides):
        raise ValueError(
            f"word_maps: maps have sides {', '.join(map(str, sides))}; say by side= which ones, not {side}"
        )
    return mean_map(calls, sides[0] if side is None else side)


def mean_map(calls: Iterable[Any], side: int) -> Tensor:
    """Attention of the calls over side x side patches, averaged over heads and layers, [b, n, m]."""
    own = [call.weights().mean(1) for call in calls if call.query.shape[2] == side**2]
    return torch.stack(own).mean(0)


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
