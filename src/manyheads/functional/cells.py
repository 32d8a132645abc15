"""Layers of feature maps on grids [b, height, width, e], features last, whose padded cells read as zeros.

real: [b, height, width], True = real, or None where every cell is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.functional.deferred import recomputing
from manyheads.functional.linear import widen


def shown(x: Tensor, real: Tensor | None) -> Tensor:
    """Zeros for cells that are padding."""
    return x if real is None else x.masked_fill(~real[..., None], 0.0)


def convolve(layer: Any, x: Tensor, real: Tensor | None = None) -> Tensor:
    """A layer that wants features first, over [b, *sizes, e] of which padded cells read as zeros, as those outside do:
    so that a grid with a padded rim gives what the grid without it gives."""
    output: Tensor = layer(shown(x, real).movedim(-1, 1))
    return output.movedim(1, -1)


def depthwise(dim: int, kernel: int, *, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution of each feature with itself that keeps the size of the map."""
    return nn.Conv2d(dim, dim, kernel, padding=(kernel - 1) * dilation // 2, dilation=dilation, groups=dim, bias=bias)


def cell_counts(grid: Tensor, real: Tensor | None) -> Tensor:
    """How many cells of each image are real, [b or 1, 1, 1, 1], at least one."""
    if real is None:
        return torch.full((1, 1, 1, 1), grid[0, ..., 0].numel(), device=grid.device)
    return real.sum((1, 2))[:, None, None, None].clamp(min=1)


def cell_mean(grid: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real cells, [b, 1, 1, e]; summed in float32 at least."""
    total = widen(shown(grid, real)).sum((1, 2), keepdim=True)
    return (total / cell_counts(grid, real)).to(grid.dtype)


def square_means(x: Tensor, real: Tensor | None, step: int) -> tuple[Tensor, Tensor | None]:
    """x [b, height, width, e], real [b, height, width] -> means of the real cells of each step x step square, those at
    the rim having fewer, and which squares have one (None where all cells are real)."""
    if step == 1:
        return shown(x, real), real
    short = (0, -x.shape[2] % step, 0, -x.shape[1] % step)
    count = x.new_ones(1, *x.shape[1:3]) if real is None else real.to(x.dtype)
    squares, count = (
        t.unflatten(2, (-1, step)).unflatten(1, (-1, step)).sum((2, 4))
        for t in (F.pad(shown(x, real), (0, 0, *short)), F.pad(count, short)[..., None])
    )
    return squares / count.clamp(min=1), None if real is None else count[..., 0] > 0


class FeedForward(nn.Module):
    """down(act(up(x))), each cell by itself; act is GELU where none is given."""

    def __init__(self, dim: int, hidden: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.act = nn.GELU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.act(self.up(x)))
        return output


class CellNorm(nn.BatchNorm1d):
    """Batch normalisation of [b, *sizes, e] over cells that are real; parameters and buffers as in PyTorch's.

    A checkpointed pass that is run again in backward does not move the running statistics a second time.
    """

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training or self.running_mean is None or self.running_var is None:
            mean, var, count = self._statistics(wide, real)
            if self.training and self.track_running_stats and not recomputing():
                self._move(mean.detach(), var.detach(), count)
        else:
            mean, var = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
        scale = (var + self.eps).rsqrt()
        if not self.affine or self.weight is None:
            return ((wide - mean) * scale).to(x.dtype)
        return ((wide - mean) * (scale * self.weight.to(wide.dtype)) + self.bias.to(wide.dtype)).to(x.dtype)

    def _statistics(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        cells = x.flatten(0, -2)
        weight = torch.ones_like(cells[:, :1]) if real is None else real.flatten()[:, None].to(x.dtype)
        count = weight.sum()
        share = weight / count.clamp(min=1)
        mean = (cells * share).sum(0)
        return mean, ((cells - mean).square() * share).sum(0), count

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """The running statistics, by the momentum; without one they are the mean of all batches."""
        if self.running_mean is None or self.running_var is None:
            return
        seen, tracked = count > 0, self.num_batches_tracked
        if tracked is not None:
            tracked.add_(seen)
        unbiased = var * count / (count - 1).clamp(min=1)
        for held, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            share: Any = self.momentum
            if share is None:
                share = 1.0 if tracked is None else 1.0 / tracked.clamp(min=1).to(held.dtype)
            held.add_(((new.to(held.dtype) - held) * share * seen).to(held.dtype))
