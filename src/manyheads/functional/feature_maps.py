"""Feature maps whose padded cells are as if the map had ended before them.

Channels last: x [b, *sizes, c] of two axes or three, real [b, *sizes] or None. What is padded is zero in front of every
convolution, stays out of every norm, and a map is resized as one of the size of what is real: its extent [b, axes], up
to the last real row, column, slice. A hole inside that counts as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.finite import blanked
from manyheads.functional.deferred import recomputing

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


def shown(x: Tensor, real: Tensor | None) -> Tensor:
    """x with zeros for what is padded."""
    return x if real is None else blanked(x, ~real)


def convolved(layer: nn.Module, x: Tensor, real: Tensor | None = None) -> Tensor:
    """A convolution or pool of torch's, over cells with channels last."""
    output: Tensor = layer(shown(x, real).movedim(-1, 1))
    return output.movedim(1, -1)


class CellNorm(nn.BatchNorm1d):
    """Batch norm over the real cells of maps of any number of axes; its averages move once per pass, also where that is
    checkpointed and runs again. State as torch's BatchNorm2d."""

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None or not self.training:
            return self._normed(x.reshape(-1, x.shape[-1])).view(x.shape)
        normed = self._normed(x[real])
        return torch.zeros_like(x, dtype=normed.dtype).masked_scatter(real[..., None], normed)

    def _normed(self, cells: Tensor) -> Tensor:
        if not (self.training and recomputing()):
            return super().forward(cells)
        assert self.running_mean is not None
        assert self.running_var is not None
        thrown_away = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(cells, *thrown_away, self.weight, self.bias, training=True, eps=self.eps)


def extent(real: Tensor) -> Tensor:
    """[b, *sizes] -> [b, axes], at least one along each: how far what is real reaches."""
    found = []
    for axis in range(1, real.ndim):
        others = tuple(a for a in range(1, real.ndim) if a != axis)
        place = torch.arange(1, real.shape[axis] + 1, device=real.device)
        found.append((real.any(others) * place).amax(1).clamp(min=1))
    return torch.stack(found, 1)


def rectangle(reach: Tensor, sizes: Sequence[int]) -> Tensor:
    """[b, axes] -> [b, *sizes]: real up to this extent."""
    real = torch.ones(len(reach), *sizes, dtype=torch.bool, device=reach.device)
    for axis, size in enumerate(sizes):
        inside = torch.arange(size, device=reach.device) < reach[:, axis, None]
        real = real & inside.view(len(reach), *(size if a == axis else 1 for a in range(len(sizes))))
    return real


def _along(x: Tensor, axis: int, weights: Tensor) -> Tensor:
    """weights [b, new, old] on an axis of x."""
    moved = x.movedim(axis, 1)
    mixed = weights.to(x.dtype) @ moved.flatten(2)
    return mixed.unflatten(2, moved.shape[2:]).movedim(1, axis)


def _linear_weights(old: Tensor, new: Tensor, size: int, wide: int) -> Tensor:
    """[b, wide, size]: linear interpolation of `old` cells at the centres of `new` ones, as torch without corners."""
    place = (torch.arange(wide, device=old.device) + 0.5) * (old.double() / new)[:, None] - 0.5
    place = torch.minimum(place.clamp(min=0), (old - 1)[:, None].to(place.dtype))
    return (1 - (place[..., None] - torch.arange(size, device=old.device)).abs()).clamp(min=0)


def _nearest_weights(old: Tensor, new: Tensor, size: int, wide: int) -> Tensor:
    """The same for the nearest cell below."""
    place = torch.arange(wide, device=old.device) * old[:, None] // new[:, None]
    return place[..., None] == torch.arange(size, device=old.device)


def _mean_weights(old: Tensor, new: Tensor, size: int, wide: int) -> Tensor:
    """The same for the mean of the cells that a new one covers, as torch's adaptive pool."""
    i, j = torch.arange(wide, device=old.device), torch.arange(size, device=old.device)
    first, behind = i * old[:, None] // new[:, None], -(-(i + 1) * old[:, None] // new[:, None])
    inside = (j >= first[..., None]) & (j < behind[..., None])
    return inside / inside.sum(-1, keepdim=True).clamp(min=1).double()


def resized(
    x: Tensor, sizes: Sequence[int], reach: Tensor | None = None, into: Tensor | None = None, *, nearest: bool = False
) -> Tensor:
    """x at other sizes, interpolated (corners not aligned). reach, into: the extents of x and of the result, where
    something is padded."""
    if tuple(x.shape[1:-1]) == tuple(sizes) and reach is None and into is None:
        return x
    if reach is None and into is None:
        mode = "nearest" if nearest else _LINEAR[len(sizes)]
        return F.interpolate(x.movedim(-1, 1), tuple(sizes), mode=mode).movedim(1, -1)
    return _by_weights(x, sizes, reach, into, _nearest_weights if nearest else _linear_weights)


def averaged(x: Tensor, sizes: Sequence[int], real: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """x pooled to these sizes, each new cell the mean of the real ones that it covers. into: the extent of the result,
    where something is padded."""
    if real is None and into is None:
        pool: Any = F.adaptive_avg_pool2d if len(sizes) == 2 else F.adaptive_avg_pool3d
        pooled: Tensor = pool(x.movedim(-1, 1), tuple(sizes))
        return pooled.movedim(1, -1)
    if real is None:
        return _by_weights(x, sizes, None, into, _mean_weights)
    reach = extent(real)
    mean = _by_weights(shown(x, real), sizes, reach, into, _mean_weights)
    share = _by_weights(real[..., None].to(x.dtype), sizes, reach, into, _mean_weights)
    return mean / torch.where(share > 0, share, 1.0)


def _by_weights(x: Tensor, sizes: Sequence[int], reach: Tensor | None, into: Tensor | None, weights: object) -> Tensor:
    assert callable(weights)
    whole = [torch.tensor(s, device=x.device).expand(len(x), -1) for s in (tuple(x.shape[1:-1]), tuple(sizes))]
    old, new = (given if given is not None else w for given, w in zip((reach, into), whole, strict=True))
    for axis, wide in enumerate(sizes):
        x = _along(x, axis + 1, weights(old[:, axis], new[:, axis], x.shape[axis + 1], wide))
    return x


def cell_mean(x: Tensor, real: Tensor | None) -> Tensor:
    """[b, *sizes, c] -> [b, c]: the mean of the real cells, zero where there is none."""
    axes = tuple(range(1, x.ndim - 1))
    if real is None:
        return x.mean(axes)
    return shown(x, real).sum(axes) / real.sum(axes).clamp(min=1)[:, None].to(x.dtype)
