"""Square windows over a grid of any size: cut, put back, and the relative places within one.

shift: how far the windows' corners are moved from the grid's, down and to the right. What is cut off at the rim is a
smaller window of its own, as where a grid is rolled around and masked; so the size of the grid changes no window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.cells import shown


def _rims(height: int, width: int, window: int, shift: int) -> list[int]:
    """Left, right, top and bottom, so that whole windows cover the grid."""
    before = -shift % window
    return [before, -(width + before) % window, before, -(height + before) % window]


def into_windows(grid: Tensor, window: int, shift: int = 0) -> Tensor:
    """[b, height, width, e] -> [b, rows, columns, window^2, e], zeros outside the grid."""
    filled = F.pad(grid, [0, 0, *_rims(grid.shape[1], grid.shape[2], window, shift)])
    return filled.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3).flatten(3, 4)


def windows_of_real(
    real: Tensor | None, size: tuple[int, int], window: int, shift: int, device: torch.device
) -> Tensor | None:
    """Which cells of each window are real, [b or 1, rows, columns, window^2]; None where all are."""
    if real is None:
        if not any(_rims(*size, window, shift)):
            return None
        real = torch.ones(1, *size, dtype=torch.bool, device=device)
    return into_windows(real[..., None], window, shift)[..., 0]


def from_windows(windows: Tensor, size: tuple[int, int], window: int, shift: int = 0) -> Tensor:
    """Back to [b, height, width, e]."""
    split = windows.unflatten(3, (window, window)).transpose(2, 3)
    left, _, top, _ = _rims(*size, window, shift)
    return split.flatten(3, 4).flatten(1, 2)[:, top : top + size[0], left : left + size[1]]


def within_windows(
    grid: Tensor, real: Tensor | None, window: int, attend: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """attend(grid, real) on each window as a grid of its own, and back in place."""
    size = (grid.shape[1], grid.shape[2])
    there = windows_of_real(real, size, window, 0, grid.device)
    cells = into_windows(shown(grid, real), window)
    if there is not None:
        there = there.expand(cells.shape[:-1]).flatten(0, 2).unflatten(1, (window, window))
    found = attend(cells.flatten(0, 2).unflatten(1, (window, window)), there)
    return from_windows(found.reshape(cells.shape), size, window)


def relative_places(window: int, device: torch.device) -> Tensor:
    """For each pair of cells of a window, the row of a table of (2 window - 1)^2 that their distance has."""
    at = torch.arange(window, device=device)
    gap = at[:, None] - at[None] + window - 1
    return (gap[:, None, :, None] * (2 * window - 1) + gap[None, :, None, :]).flatten(0, 1).flatten(1, 2)
