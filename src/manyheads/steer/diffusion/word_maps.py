"""Maps of words over a picture's patches, as training losses and masks see them.

Shapes: b pictures, h heads, n patches (a square), m words.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from manyheads.hosts.taps import record


def word_maps(model: Any, pictures: Tensor, time: float, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross attention averaged over heads and layers, [b, n, m]; gradients reach the model."""
    with record(model, kind="cross") as calls:
        model.velocities(pictures, time, ids, mask)
        return torch.stack([call.weights().mean(1) for call in calls]).mean(0)


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
