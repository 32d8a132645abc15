"""Scans over grids against their closed form, along paths that are walked cell by cell."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.functional.grid_scans import GridScan, affine_scan, crossing_paths, selective_scan, snake_paths


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 40, 300])
def test_affine_scan(n):
    torch.manual_seed(n)
    decay, given = torch.rand(2, n, 3).double(), torch.randn(2, n, 3).double()
    decay[:, ::7] = 0
    h, wanted = torch.zeros(2, 3).double(), []
    for t in range(n):
        h = decay[:, t] * h + given[:, t]
        wanted.append(h)
    torch.testing.assert_close(affine_scan(decay, given), torch.stack(wanted, 1))


def closed_form(u, step, rate, given, read):
    """y_t = sum over j <= t of read_t . exp(rate (step_(j+1) + .. + step_t)) step_j given_j u_j; no batch."""
    y = torch.zeros_like(u)
    for t in range(len(u)):
        for j in range(t + 1):
            faded = (step[j + 1 : t + 1].sum(0)[:, None] * rate).exp()
            y[t] += (read[t] * faded * given[j]).sum(-1) * step[j] * u[j]
    return y


def random_scan(n, e=3, s=2):
    torch.manual_seed(0)
    u, step = torch.randn(n, e).double(), torch.rand(n, e).double()
    return u, step, -torch.rand(e, s).double(), torch.randn(n, s).double(), torch.randn(n, s).double()


def test_selective_scan():
    u, step, rate, given, read = random_scan(21)
    found = selective_scan(u[None], step[None], rate, given[None], read[None])[0]
    torch.testing.assert_close(found, closed_form(u, step, rate, given, read))


def test_padded_cells_are_passed_by():
    u, step, rate, given, read = random_scan(21)
    real = torch.rand(21) < 0.6
    found = selective_scan(u[None], step[None], rate, given[None], read[None], real[None])[0]
    wanted = closed_form(*(t if t is rate else t[real] for t in (u, step, rate, given, read)))
    torch.testing.assert_close(found[real], wanted)


def test_large_steps_forget_and_stay_finite():
    u, step, rate, given, read = random_scan(21)
    step[10] = 1e30
    u[10] = 0
    found = selective_scan(u[None], step[None], rate, given[None], read[None])[0]
    torch.testing.assert_close(found[11:], closed_form(u[11:], step[11:], rate, given[11:], read[11:]))


def walk(height, width, start, turn, along):
    """A snake: from `start` in the direction `along` to the border, one step in the direction `turn`, and back."""
    at, path = start, [start]
    while len(path) < height * width:
        new = (at[0] + along[0], at[1] + along[1])
        if not (0 <= new[0] < height and 0 <= new[1] < width):
            new, along = (at[0] + turn[0], at[1] + turn[1]), (-along[0], -along[1])
        path.append(new)
        at = new
    return [i * width + j for i, j in path]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (4, 3), (1, 3), (2, 1)])
def test_snakes(height, width):
    low, right = height - 1, width - 1
    wanted = [
        walk(height, width, (0, 0), (1, 0), (0, 1)),
        walk(height, width, (low, 0), (-1, 0), (0, 1)),
        walk(height, width, (low, 0), (0, 1), (-1, 0)),
        walk(height, width, (low, right), (0, -1), (-1, 0)),
    ]
    assert snake_paths(torch.ones(1, height, width, dtype=torch.bool))[:, 0].tolist() == wanted
    real = torch.zeros(1, height + 1, width + 2, dtype=torch.bool)
    real[:, :height, :width] = True
    number = torch.full(real.shape[1:], -1)
    number[:height, :width] = torch.arange(height * width).view(height, width)
    for path, want in zip(snake_paths(real)[:, 0], wanted, strict=True):
        assert [k for k in number.flatten()[path].tolist() if k >= 0] == want


def test_straight_paths():
    rows, columns, up, left = crossing_paths(2, 3, 2, torch.device("cpu"))[:, 0].tolist()
    assert rows == list(range(12))
    assert columns == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert (up, left) == (rows[::-1], columns[::-1])


@torch.no_grad()
def test_four_ways():
    torch.manual_seed(0)
    module, cells = GridScan(4, 2, 3).double(), torch.randn(2, 12, 4).double()
    for p in module.parameters():
        p.add_(0.2 * torch.randn_like(p))
    paths = snake_paths(torch.ones(1, 3, 4, dtype=torch.bool))
    wanted = torch.zeros_like(cells)
    for way in range(4):
        for b in range(2):
            u = cells[b, paths[way, 0]]
            inner, given, read = module.x_proj[way](u).split([3, 2, 2], -1)
            step = F.softplus(module.dt_proj[way](inner))
            y = closed_form(u, step, -module.A_logs[way].exp(), given, read) + module.Ds[way] * u
            wanted[b, paths[way, 0]] += y
    torch.testing.assert_close(module(cells, paths, None), wanted)
