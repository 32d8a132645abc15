"""Batch normalisation over real cells is torch's over the cells that are there."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
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


def _cumulative(norm):
    norm.momentum = None  # as torch.optim.swa_utils.update_bn sets it, for the mean over a whole data set


def _of_the_batch(norm):
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def _kept(norm):
    norm.track_running_stats = False


def _plain(norm):
    norm.weight = norm.bias = None


@pytest.mark.parametrize("change", [_cumulative, _of_the_batch, _kept, _plain])
def test_it_is_set_as_torchs_is(change):
    torch.manual_seed(0)
    ours, theirs = CellNorm(4).double(), nn.BatchNorm1d(4).double()
    for norm in (ours, theirs):
        change(norm)
    for training in (True, True, True, False):
        x, real = torch.randn(3, 4, 5, 4).double() + 1, torch.rand(3, 4, 5) < 0.6
        ours.train(training)
        theirs.train(training)
        torch.testing.assert_close(ours(x, real)[real], theirs(x[real]))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, held in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], held)


def test_averages_over_a_data_set_leave_out_what_is_all_padding():
    norm, x = CellNorm(2), torch.randn(2, 3, 3, 2)
    update_bn([x[:1], x[1:]], norm)
    wanted = norm.running_mean.clone()
    torch.testing.assert_close(wanted, x.mean((0, 1, 2)))
    _cumulative(norm)
    norm.train()(x, torch.zeros(2, 3, 3, dtype=torch.bool))
    norm(x, None)
    torch.testing.assert_close(norm.running_mean, wanted)
