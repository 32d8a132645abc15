"""Batch normalisation over real cells is torch's over the cells that are there."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from manyheads.functional.cells import CellNorm, cell_mean


def test_equals_torch_over_the_real_cells():
    torch.manual_seed(0)
    ours, theirs = CellNorm(4).double(), nn.BatchNorm1d(4).double()
    with torch.no_grad():
        for p in (*ours.parameters(), *theirs.parameters()):
            p.copy_(torch.linspace(0.5, 2, 4))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for _ in range(2):
        x, real = torch.randn(3, 4, 5, 4).double(), torch.rand(3, 4, 5) < 0.6
        torch.testing.assert_close(ours(x, real)[real], theirs(x[real]))
        torch.testing.assert_close(ours(x, None).flatten(0, 2), theirs(x.flatten(0, 2)))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x, real)[real], theirs(x[real]))
    torch.testing.assert_close(cell_mean(x, real)[1, 0, 0], x[1][real[1]].mean(0))


def test_a_checkpointed_pass_moves_the_averages_once():
    once, twice = CellNorm(2), CellNorm(2)
    x = torch.randn(2, 3, 3, 2, requires_grad=True)
    once(x, None)
    checkpoint(twice, x, None, use_reentrant=False).sum().backward()
    torch.testing.assert_close(once.running_mean, twice.running_mean)
    assert int(twice.num_batches_tracked) == 1


def test_nothing_real_is_finite():
    norm, x = CellNorm(2), torch.randn(1, 2, 2, 2)
    assert bool(norm(x, torch.zeros(1, 2, 2, dtype=torch.bool)).isfinite().all())
    assert bool(norm.running_var.isfinite().all())
