"""Losses and masks on the maps of words, against loops and on maps that can be thought through."""

import math

import pytest
import torch
from drawing_models import CAPTIONS, tiny, tiny_unet
from torch.testing import assert_close

from manyheads.hosts.taps import record
from manyheads.steer.diffusion.word_maps import scaled_map, smoothed, word_maps
from manyheads.steer.personal.attencraft import concept_masks, jensen_shannon, similarity
from manyheads.steer.personal.disendiff import disendiff_loss, soft_overlap
from manyheads.steer.personal.dreamtext import character_loss
from manyheads.steer.personal.mcpl import contrastive_loss, masked_velocity_loss, on_pixels, union_mask


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
    quiet, told = smoothed(scaled_map(c), 0.5) ** 2, smoothed(scaled_map(m), 0.5)
    loss = disendiff_loss([m], [c])
    assert_close(loss, 1 - soft_overlap(quiet, told))
    loss.backward()
    assert c.grad is None or float(c.grad.abs().sum()) == 0
    assert float(m.grad.abs().sum()) > 0
    others = [blob(6, 6), blob(5, 1)]
    kept = [quiet, *(smoothed(scaled_map(own), 0.5) ** 2 for own in others)]
    apart = (soft_overlap(kept[0], kept[1]) + soft_overlap(kept[0], kept[2]) + soft_overlap(kept[1], kept[2])) / 3
    bind = disendiff_loss([m], [c]) + sum(disendiff_loss([m], [own]) for own in others)
    assert_close(disendiff_loss([m, m, m], [c, *others]), bind + apart)
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


def test_masks_are_where_a_concepts_claim_beats_every_other_by_the_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    cross = torch.rand(3, 9, generator=generator, dtype=torch.double)
    affinity = torch.rand(9, 9, generator=generator, dtype=torch.double).softmax(-1)

    def scaled(rows: list[list[float]]) -> list[list[float]]:
        low, high = min(map(min, rows)), max(map(max, rows))
        return [[(own - low) / (high - low) for own in row] for row in rows]

    once = scaled(affinity.tolist())
    power = once
    for _ in range(3):
        power = [[sum(row[k] * once[k][j] for k in range(9)) for j in range(9)] for row in power]
    power = scaled(power)
    claimed = []
    for own in cross.tolist():
        sharp = scaled([[value**2 for value in own]])[0]
        claimed += scaled([[sum(power[i][j] * sharp[j] for j in range(9)) for i in range(9)]])
    found = concept_masks(cross, affinity)
    for k in range(3):
        for i in range(9):
            others = [claimed[other][i] for other in range(3) if other != k]
            assert bool(found[k, i]) == all(claimed[k][i] - own > 0.1 for own in others)
    assert 0 < int(found.sum()) < 9
    with pytest.raises(ValueError, match="do not fit"):
        concept_masks(cross, affinity[:5, :5])


def test_a_concept_without_a_rival_is_masked_where_its_own_claim_is() -> None:
    cross = torch.tensor([[0.0, 0.5, 1.0, 0.05]], dtype=torch.double)
    assert concept_masks(cross, torch.eye(4, dtype=torch.double)).tolist() == [[False, True, True, False]]


def test_jensen_and_shannons_divergence_is_of_softmaxes() -> None:
    a, b = [0.0, 1.0, 0.5], [1.0, 1.0, 0.0]
    p, q = ([math.exp(x) / sum(map(math.exp, own)) for x in own] for own in (a, b))
    kl = [sum(x * math.log(x / ((y + z) / 2)) for x, y, z in zip(own, p, q, strict=True)) for own in (p, q)]
    assert float(jensen_shannon(torch.tensor(a), torch.tensor(b))) == pytest.approx(sum(kl) / 2, abs=1e-6)
    assert float(jensen_shannon(torch.tensor(a), torch.tensor(a))) == pytest.approx(0, abs=1e-6)


def test_structural_similarity_is_its_equation_over_windows() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(64, generator=generator, dtype=torch.double) for _ in range(2))
    values = []
    for top in range(2):
        for left in range(2):
            x, y = (own.view(8, 8)[top : top + 7, left : left + 7].flatten() for own in (a, b))
            both = float(((x - x.mean()) * (y - y.mean())).sum() / 48)
            first = (2 * float(x.mean() * y.mean()) + 1e-4) / float(x.mean() ** 2 + y.mean() ** 2 + 1e-4)
            values.append(first * (2 * both + 9e-4) / float(x.var() + y.var() + 9e-4))
    assert similarity(a, b) == pytest.approx(sum(values) / 4)
    assert similarity(a > 0.5, a > 0.5) == pytest.approx(1)


def test_the_masked_loss_counts_what_is_inside_over_all_places() -> None:
    a, b = torch.randn(2, 2, 4, 4, dtype=torch.double), torch.randn(2, 2, 4, 4, dtype=torch.double)
    assert_close(masked_velocity_loss(a, b, torch.ones(2, 4, 4, dtype=torch.bool)), ((a - b) ** 2).mean())
    inside = torch.zeros(2, 4, 4, dtype=torch.bool)
    inside[1, 2, 3] = True
    assert_close(masked_velocity_loss(a, b, inside), ((a - b) ** 2)[1, :, 2, 3].sum() / 64)
    with pytest.raises(ValueError, match="holds nothing"):
        masked_velocity_loss(a, b, inside & False)


def test_masks_of_patches_become_masks_of_their_pixels() -> None:
    found = on_pixels(torch.tensor([[True, False, False, True]]), 4)
    assert found[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_the_contrast_takes_the_same_concept_in_another_view_for_its_positive() -> None:
    """Three views of two concepts, where moving by the views would take another concept."""
    views = torch.randn(3, 2, 5, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    rows, wanted = views.flatten(0, 1), 0.0
    alike = [[float(torch.cosine_similarity(a, b, dim=0)) / 0.2 for b in rows] for a in rows]
    for view in range(3):
        for concept in range(2):
            own, positive = 2 * view + concept, 2 * ((view - 1) % 3) + concept
            others = [math.exp(alike[own][j]) for j in range(6) if j != own]
            wanted += math.log(sum(others)) - alike[own][positive]
    assert float(contrastive_loss(views)) == pytest.approx(wanted / 6)
    with pytest.raises(ValueError, match="two of two"):
        contrastive_loss(views[:1])


def test_the_union_of_maps_is_where_their_sum_is_above_its_share_of_the_greatest() -> None:
    maps = torch.tensor([[[0.0, 1, 2, 4], [3.0, 0.5, 0, 0]]])
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
