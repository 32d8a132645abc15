"""State-space scans over the cells of a grid, along four paths at once.

b batch, n cells, e channels, s numbers of state per channel. For each channel, along a path:

    h_t = exp(step_t rate) h_(t-1) + step_t given_t u_t        y_t = read_t . h_t + skip u_t

with rate < 0, so that nothing grows. Linear in n: scans double their reach within a chunk, and the chunks' ends are
scanned in the same way. A padded cell is passed by: it neither gives nor forgets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.functional.linear import widen
from manyheads.functional.precision import own_dtype

CHUNK = 16


def affine_scan(decay: Tensor, given: Tensor) -> Tensor:
    """decay, given [b, n, ...] -> h [b, n, ...] with h_t = decay_t h_(t-1) + given_t, from h = 0. Nothing is divided:
    exact also where decays are zero."""
    n = given.shape[1]
    size = min(CHUNK, n)
    rim = [0, 0] * (given.ndim - 2) + [0, -n % size]
    decay, given = (F.pad(t, rim).unflatten(1, (-1, size)) for t in (decay, given))
    reach = 1
    while reach < size:
        given = torch.cat([given[:, :, :reach], given[:, :, reach:] + decay[:, :, reach:] * given[:, :, :-reach]], 2)
        decay = torch.cat([decay[:, :, :reach], decay[:, :, reach:] * decay[:, :, :-reach]], 2)
        reach *= 2
    if given.shape[1] > 1:
        ends = affine_scan(decay[:, :-1, -1], given[:, :-1, -1])
        before = torch.cat([torch.zeros_like(ends[:, :1]), ends], 1)
        given = given + decay * before[:, :, None]
    return given.flatten(1, 2)[:, :n]


def selective_scan(
    u: Tensor, step: Tensor, rate: Tensor, given: Tensor, read: Tensor, real: Tensor | None = None
) -> Tensor:
    """u, step [b, n, e]; rate [e, s]; given, read [b, n, s]; real [b, n] -> y [b, n, e] without the skip."""
    decay = (step[..., None] * rate).exp()
    inward = (step * u)[..., None] * given[:, :, None]
    if real is not None:
        there = real[..., None, None]
        decay, inward = decay.masked_fill(~there, 1.0), inward.masked_fill(~there, 0.0)
    return (affine_scan(decay, inward) * read[:, :, None]).sum(-1)


def crossing_paths(height: int, width: int, depth: int, device: torch.device) -> Tensor:
    """Cells in the order of four straight paths, [4, 1, n]: by rows, by columns, and both backwards; the `depth` cells
    of one place follow each other. Cells are numbered by row, column and depth."""
    cells = torch.arange(height * width * depth, device=device).view(height, width, depth)
    rows, columns = cells.flatten(), cells.transpose(0, 1).flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])[:, None]


def snake_paths(real: Tensor) -> Tensor:
    """Cells in the order of four paths that never jump, [4, b, n], for real [b, height, width]: rows from the top left,
    rows from the bottom left, columns from the bottom left, columns from the bottom right, both upwards first. Corners
    are those of what is real."""
    height, width = real.shape[1:]
    i, j = torch.meshgrid(*(torch.arange(side, device=real.device) for side in (height, width)), indexing="ij")
    low, right = height - 1 - i, width - 1 - j
    rows, columns = (_extents(real.any(axis))[:, None, None] for axis in (2, 1))
    keys = (
        (i * width + torch.where(i % 2 == 0, j, right)).expand_as(real),
        low * width + torch.where((rows - 1 - i) % 2 == 0, j, right),
        (j * height + torch.where(j % 2 == 0, low, i)).expand_as(real),
        right * height + torch.where((columns - 1 - j) % 2 == 0, low, i),
    )
    return torch.stack(keys).flatten(2).argsort(-1)


def _extents(used: Tensor) -> Tensor:
    """used [b, n] -> the place behind the last that is used, [b]."""
    return ((torch.arange(used.shape[1], device=used.device) + 1) * used).amax(1)


def _taken(cells: Tensor, path: Tensor) -> Tensor:
    """cells [b, n, e] in the order of path [b or 1, n]."""
    return cells.gather(1, path[..., None].expand(len(cells), -1, cells.shape[-1]))


class GridScan(nn.Module):
    """Four selective scans along four paths, each with parameters of its own, put back in place and summed.

    steps, given and read of a cell are linear in its u: step = softplus(W_dt W_r u + b), of `rank` numbers in between.
    """

    def __init__(self, dim: int, state: int, rank: int) -> None:
        super().__init__()
        self.widths = [rank, state, state]
        self.x_proj = nn.ModuleList(nn.Linear(dim, rank + 2 * state, bias=False) for _ in range(4))
        self.dt_proj = nn.ModuleList(nn.Linear(rank, dim) for _ in range(4))
        self.A_logs = nn.Parameter(torch.arange(1.0, state + 1).log().expand(4, dim, state).clone())
        self.Ds = nn.Parameter(torch.ones(4, dim))
        with torch.no_grad():
            for layer in self.dt_proj:
                # Mamba's: softplus of the bias lies between 0.001 and 0.1, evenly by its logarithm.
                step = 10 ** (torch.rand(dim) * 2 - 3)
                layer.bias.copy_(step + (-(-step).expm1()).log())  # type: ignore[operator]
                nn.init.uniform_(layer.weight, -(rank**-0.5), rank**-0.5)  # type: ignore[arg-type]

    def forward(self, cells: Tensor, paths: Tensor, real: Tensor | None) -> Tensor:
        """cells [b, n, e], paths [4, b or 1, n], real [b, n] -> [b, n, e], in float32 at least."""
        total = torch.zeros_like(widen(cells))
        for way, path in enumerate(paths):
            u = _taken(cells, path)
            inner, given, read = self.x_proj[way](u).split(self.widths, -1)
            step = F.softplus(widen(self.dt_proj[way](inner)))
            there = None if real is None else real.gather(1, path.expand(len(real), -1))
            with own_dtype(cells):
                rate = -widen(self.A_logs[way]).exp()
                y = selective_scan(widen(u), step, rate, widen(given), widen(read), there) + self.Ds[way] * widen(u)
                total = total + _taken(y, path.argsort(-1))
        return total
