"""Losses and masks on the maps of words, against loops and on maps that can be thought through."""

import math

import pytest
import torch
from drawing_models import CAPTIONS, tiny, tiny_unet
from torch.testing import assert_close

from manyheads.hosts.taps import record
from manyheads.steer.diffusion.attencraft import concept_masks
from manyheads.steer.diffusion.disendiff import disendiff_loss, soft_overlap
from manyheads.steer.diffusion.dreamtext import character_loss
from manyheads.steer.diffusion.masked_loss import masked_velocity_loss, union_mask
from manyheads.steer.diffusion.word_maps import scaled_map, smoothed, word_maps


def blob(row: float, column: float, side: int = 8) -> torch.Tensor:
    at = torch.arange(side, dtype=torch.double)
    return torch.exp(-((at[:, None] - row) ** 2 + (at - column) ** 2) / 4).flatten()


def test_word_maps_are_the_mean_over_layers_and_heads_and_carry_gradients() -> None:
    model = tiny()
    ids, mask = model.encode(CAPTIONS)
    x = torch.randn(3, 1, 8, 8, dtype=torch.double)
    maps = word_maps(model, x, 0.5, ids, mask)
    with torch.no_grad(), record(model, kind="cross") as calls:
        model.velocities(x, 0.5, ids, mask)
    assert_close(maps.detach(), sum(call.weights().sum(1) for call in calls) / 4)
    maps[..., 2].sum().backward()
    assert float(model.words.weight.grad.abs().sum()) > 0


def test_word_maps_of_a_unet_are_of_one_size() -> None:
    model = tiny_unet()
    ids, mask = model.encode(CAPTIONS)
    x = torch.randn(3, 1, 8, 8, dtype=torch.double)
    with torch.no_grad(), record(model, kind="cross") as calls:
        model.velocities(x, 0.5, ids, mask)
    for side, layers in ((4, [1, 2, 3]), (8, [0, 4])):
        wanted = sum(calls[layer].weights().sum(1) for layer in layers) / (2 * len(layers))
        assert_close(word_maps(model, x, 0.5, ids, mask, side=side).detach(), wanted)
    for side in (None, 16):
        with pytest.raises(ValueError, match="sides 8, 4, 4, 4, 8"):
            word_maps(model, x, 0.5, ids, mask, side=side)


def test_smoothing_is_a_small_gaussian_that_keeps_flat_maps() -> None:
    grid = torch.rand(4, 4, dtype=torch.double)
    found = smoothed(grid.flatten(), 0.5).reshape(4, 4)
    share = {0: 1.0, 1: math.exp(-2.0)}
    whole = sum(share[abs(a)] * share[abs(b)] for a in (-1, 0, 1) for b in (-1, 0, 1))
    for i in range(4):
        for j in range(4):
            wanted = 0.0
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    row, column = (3 - abs(3 - abs(place)) for place in (i + a, j + b))
                    wanted += share[abs(a)] * share[abs(b)] / whole * float(grid[row, column])
            assert float(found[i, j]) == pytest.approx(wanted)
    assert_close(smoothed(torch.ones(16), 0.5), torch.ones(16))


def test_equal_maps_overlap_wholly_and_maps_apart_hardly() -> None:
    one = torch.tensor([1.0, 1, 0, 0])
    assert float(soft_overlap(one, one)) == 1
    assert float(soft_overlap(one, 1 - one)) == pytest.approx(1 / 5)


def test_disendiff_is_its_equation_and_its_class_maps_are_left_alone_by_the_bind() -> None:
    m, c = blob(2, 2).requires_grad_(), blob(2, 4).requires_grad_()
    quiet = scaled_map(smoothed(scaled_map(c), 0.5) ** 2)
    loss = disendiff_loss([m], [c])
    assert_close(loss, 1 - soft_overlap(quiet, scaled_map(m)))
    loss.backward()
    assert c.grad is None or float(c.grad.abs().sum()) == 0
    assert float(m.grad.abs().sum()) > 0
    both = disendiff_loss([m, m], [c, blob(6, 6)])
    apart = soft_overlap(scaled_map(smoothed(scaled_map(blob(6, 6)), 0.5) ** 2), quiet)
    bind = (disendiff_loss([m], [c]) + disendiff_loss([m], [blob(6, 6)])) / 2
    assert_close(both, bind + apart)
    with pytest.raises(ValueError, match="one for each"):
        disendiff_loss([m], [])


def test_going_down_the_separate_loss_moves_two_classes_apart() -> None:
    maps = [blob(3, 3).requires_grad_(), blob(3, 4).requires_grad_()]
    start = float(soft_overlap(*(scaled_map(own.detach()) for own in maps)))
    optimizer = torch.optim.SGD(maps, lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        disendiff_loss([own.detach() for own in maps], maps).backward()
        optimizer.step()
    assert float(soft_overlap(*(scaled_map(own.detach()) for own in maps))) < 0.8 * start


def test_masks_follow_affinity_and_leave_what_nobody_claims() -> None:
    cross = torch.zeros(2, 6)
    cross[0, 0], cross[1, 3] = 1.0, 1.0
    affinity = torch.zeros(6, 6)
    for group in ([0, 1, 2], [3, 4]):
        for i in group:
            affinity[i, group] = 1.0
    affinity[5, 5] = 1.0
    found = concept_masks(cross, affinity)
    assert [own.nonzero().flatten().tolist() for own in found] == [[0, 1, 2], [3, 4]]
    with pytest.raises(ValueError, match="do not fit"):
        concept_masks(cross, affinity[:5, :5])


def test_the_masked_loss_counts_what_is_inside() -> None:
    a, b = torch.randn(2, 2, 4, 4, dtype=torch.double), torch.randn(2, 2, 4, 4, dtype=torch.double)
    assert_close(masked_velocity_loss(a, b, torch.ones(2, 4, 4, dtype=torch.bool)), ((a - b) ** 2).mean())
    inside = torch.zeros(2, 4, 4, dtype=torch.bool)
    inside[1, 2, 3] = True
    assert_close(masked_velocity_loss(a, b, inside), ((a - b) ** 2)[1, :, 2, 3].mean())
    with pytest.raises(ValueError, match="holds nothing"):
        masked_velocity_loss(a, b, inside & False)


def test_the_union_of_maps_is_where_any_is_above_its_threshold() -> None:
    maps = torch.tensor([[[0.0, 1, 2, 4], [3.0, 0, 0, 0]]])
    assert union_mask(maps, 0.4).tolist() == [[True, False, True, True]]
    assert bool(union_mask(maps, -1).all())


def test_the_character_loss_is_max_outside_less_max_inside_of_own_masks() -> None:
    maps = torch.stack([blob(1, 1), blob(6, 5), torch.ones(64, dtype=torch.double)])
    smooth, wanted = smoothed(maps, 1.0), []
    for own in smooth[:2]:
        inside = own > own.mean() + 2 * own.std()
        wanted.append(max(own[~inside].tolist()) - max(own[inside].tolist()))
    assert float(character_loss(maps)) == pytest.approx(sum(wanted) / 2)
    assert float(character_loss(maps[2:])) == 0
