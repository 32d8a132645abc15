"""Rows of a batch by runs of neighbours, against an index."""

import pytest
import torch
from torch import nn

from manyheads.hosts.attend import Scoring
from manyheads.hosts.calls import AttentionCall, runs, taken
from manyheads.hosts.sites import Site
from manyheads.steer.diffusion.common import replaced_rows

PLACES = [[], [2], [1, 2, 3], [0, 1, 4, 5], [5, 0, 1, 1], [3, 2]]


@pytest.mark.parametrize("which", PLACES)
def test_taken_as_by_an_index(which):
    rows = torch.randn(6, 3, 2)
    index = torch.tensor(which, dtype=torch.long)
    torch.testing.assert_close(taken(rows, which), rows[index], rtol=0, atol=0)
    assert [row for first, count in runs(which) for row in range(first, first + count)] == which


@pytest.mark.parametrize("which", [[2], [0, 1, 4, 5], [5, 0, 1]])
def test_replaced_as_by_an_index(which):
    query, key = torch.randn(2, 6, 4, 3, 2).transpose(2, 3)
    call = AttentionCall(Site(0, "", "", "", nn.Identity()), query, key, key, None, False, Scoring(1.0))
    call.output = query.clone()
    new = torch.randn(len(which), 3, 4, 2)
    wanted = query.index_copy(0, torch.tensor(which), new)
    torch.testing.assert_close(replaced_rows(call, which, new), wanted, rtol=0, atol=0)
    torch.testing.assert_close(call.output, query, rtol=0, atol=0)  # what others see is not written over
    mixed = call.mix_rows(lambda weights, rows: 2 * weights, which)
    torch.testing.assert_close(mixed, 2 * (call.weights() @ key)[torch.tensor(which)])
