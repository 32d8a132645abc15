"""Choosing so many of a set: by hand, and by counting."""

import torch

from manyheads.functional.drawing import draw, highest, share


def test_highest_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    among = torch.tensor([[True, True, True, False], [False, True, True, True]])
    wanted = torch.tensor([[True, False, True, False], [False, True, True, False]])
    assert torch.equal(highest(scores, among, torch.tensor([2, 2])), wanted)
    assert torch.equal(highest(scores, among, torch.tensor([4, 9])), among)
    assert not highest(scores, among, torch.tensor([0, 0])).any()


def test_draws_are_even():
    torch.manual_seed(0)
    among = torch.tensor([[True, False, True, True, True]]).expand(2000, -1)
    drawn = draw(among, torch.full((2000,), 2))
    assert (drawn.sum(1) == 2).all()
    assert not (drawn & ~among).any()
    counts = drawn.sum(0)[among[0]]
    assert (counts - 1000).abs().max() < 100  # four and a half deviations


def test_share_rounds_up_but_not_what_is_whole():
    among = torch.ones(1, 30, dtype=torch.bool)
    assert [int(share(among, ratio)) for ratio in (0.0, 0.1, 0.11, 1.0)] == [0, 3, 4, 30]
