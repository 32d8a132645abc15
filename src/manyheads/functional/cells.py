"""Grids [b, height, width, e] whose padded cells read as zeros, and norms over the real cells of one.

real: [b, height, width], True = real, or None where every cell is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.functional.deferred import recomputing
from manyheads.functional.linear import widen


def shown_cells(grid: Tensor, real: Tensor | None) -> Tensor:
    """The grid with zeros for what is padded."""
    return grid if real is None else grid.masked_fill(~real[..., None], 0.0)


def convolved(layer: nn.Module, grid: Tensor, real: Tensor | None) -> Tensor:
    """A layer that wants features first, over a grid of which padded cells read as zeros, as those outside it do: so
    that a grid with a padded rim gives what the grid without it gives."""
    found: Tensor = layer(shown_cells(grid, real).movedim(-1, 1))
    return found.movedim(1, -1)


def cell_counts(grid: Tensor, real: Tensor | None) -> Tensor:
    """How many cells of each image are real, [b or 1, 1, 1, 1], at least one."""
    if real is None:
        return torch.full((1, 1, 1, 1), grid[0, ..., 0].numel(), device=grid.device)
    return real.sum((1, 2))[:, None, None, None].clamp(min=1)


def cell_mean(grid: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real cells, [b, 1, 1, e]; summed in float32 at least."""
    total = widen(shown_cells(grid, real)).sum((1, 2), keepdim=True)
    return (total / cell_counts(grid, real)).to(grid.dtype)


class CellBatchNorm(nn.Module):
    """Batch normalisation of [b, ..., e], in training over the real cells of the batch alone. Names and meaning are
    those of `nn.BatchNorm2d`, but for the variance that is kept, which a pass run again in backward (a checkpointed
    one) does not move a second time."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, cells: Tensor, real: Tensor | None) -> Tensor:
        wide = widen(cells)
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean, variance = self._batch(wide, real)
        scale = self.weight.to(wide.dtype) * (variance.to(wide.dtype) + self.eps).rsqrt()
        return ((wide - mean) * scale + self.bias).to(cells.dtype)

    def _batch(self, wide: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        axes = tuple(range(wide.ndim - 1))
        count = wide[..., 0].numel() if real is None else real.sum().clamp(min=1)
        mean = shown_cells(wide, real).sum(axes) / count
        variance = shown_cells((wide - mean).square(), real).sum(axes) / count
        if not recomputing():
            unbiased = variance.detach() * (count / torch.as_tensor(count - 1, device=wide.device).clamp(min=1))
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
                self.num_batches_tracked += 1
        return mean, variance
