"""The digits: one split in three forms."""

from itertools import islice

import pytest
import torch
from sklearn.datasets import load_digits
from torch.testing import assert_close

from manyheads.tasks import create_task

FORMS = ("digits-grid", "digits-patches", "digits-pixels")


def pixels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[b, 64] intensities 0..16 of either form."""
    if "input_ids" in inputs:
        return inputs["input_ids"]
    return ((inputs["pixel_values"] + 1) * 8).flatten(1).round().long()


def test_split_is_fixed_stratified_and_disjoint() -> None:
    data = load_digits()
    seen: dict[int, int] = {}
    train, held = [], []
    for image, label in zip(data.images, data.target, strict=True):
        row = (*(int(p) for line in image for p in line), int(label))
        (held if seen.get(int(label), 0) % 5 == 0 else train).append(row)
        seen[int(label)] = seen.get(int(label), 0) + 1
    assert len(held) == 364
    assert not set(held) & set(train)
    for form in FORMS:
        task = create_task(form)
        batch = next(task.eval_batches(1000))
        rows = torch.cat([pixels(batch.inputs), batch.targets[:, None]], dim=1)
        assert [tuple(row) for row in rows.tolist()] == held
        batch = next(task.train_batches(len(train), 0))
        rows = torch.cat([pixels(batch.inputs), batch.targets[:, None]], dim=1)
        assert sorted(tuple(row) for row in rows.tolist()) == sorted(train)
    shares = torch.bincount(torch.tensor([row[-1] for row in held])).double() / len(held)
    assert_close(shares, torch.full((10,), 0.1, dtype=torch.float64), rtol=0, atol=0.005)


def test_pixel_values_are_scaled() -> None:
    inputs = next(create_task("digits-grid").train_batches(500, 0)).inputs["pixel_values"]
    assert (float(inputs.min()), float(inputs.max())) == (-1.0, 1.0)


def test_every_epoch_shows_every_image_once_in_a_new_order() -> None:
    task = create_task("digits-pixels")
    size = 1797 - 364
    stream = torch.cat([pixels(batch.inputs) for batch in islice(task.train_batches(100, 5), 30)])
    first, second = stream[:size].tolist(), stream[size : 2 * size].tolist()
    assert first != second
    assert sorted(first) == sorted(second)


def test_batches_larger_than_the_data() -> None:
    batch = next(create_task("digits-grid").train_batches(4000, 0))
    assert batch.inputs["pixel_values"].shape == (4000, 1, 8, 8)


@pytest.mark.parametrize("form", FORMS)
def test_nearest_neighbour_is_good_and_a_constant_is_chance(form: str) -> None:
    task = create_task(form)
    train, held = next(task.train_batches(1433, 0)), next(task.eval_batches(1000))
    nearest = torch.cdist(pixels(held.inputs).double(), pixels(train.inputs).double()).argmin(1)
    answers = torch.nn.functional.one_hot(train.targets[nearest], 10).double()
    good, count = task.score(answers, held.targets)
    assert good / count > 0.97
    constant = torch.zeros(364, 10)
    constant[:, 4] = 1
    assert task.score(constant, held.targets)[0] / 364 == pytest.approx(0.1, abs=0.01)
