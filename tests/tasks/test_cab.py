"""The stand-ins of CAB: what is asked follows from what is read, and errors are those of the expected value."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from manyheads.compare.train import build_model, evaluate
from manyheads.tasks import create_task, task_class
from manyheads.tasks.cab import CAB
from manyheads.tasks.task import loss_of

SIZE = {"hidden_size": 16, "heads": 2, "layers": 1, "intermediate_size": 0, "short_conv": 0, "positions": "learned"}


def test_what_follows_obeys_the_recurrence_of_what_was_read() -> None:
    """A sum of three sinusoids is a linear recurrence of order six, which the input alone tells."""
    task = create_task("forecast", noise=0, levels=65_536, n=96, horizon=24)
    batch = next(task.train_batches(20, 0))
    for read, asked in zip(batch.inputs["input_ids"].double(), batch.targets.double(), strict=True):
        series = (torch.cat([read, asked]) + 0.5) * task.step - 2.5
        windows = series.unfold(0, 7, 1)
        known = windows[:90]
        rule = torch.linalg.lstsq(known[:, :6], known[:, 6:]).solution
        missed = (windows[90:, :6] @ rule)[:, 0] - windows[90:, 6]
        assert float(missed.abs().max()) < 0.02 * float(series.std())


def test_the_error_is_that_of_the_expected_value() -> None:
    task = create_task("forecast", levels=4, n=4, horizon=2)
    logits = torch.zeros(1, 2, 5)
    logits[0, 0, 3] = 200
    total, count = task.score(logits, torch.tensor([[1, 1]]))
    assert count == 2
    assert_close(total, (2 * 1.25) ** 2 + (0.5 * 1.25) ** 2)


def test_small_images_are_the_means_of_the_large_ones() -> None:
    for batch in (next(create_task("super-resolution").train_batches(9, 0)),):
        seen = (batch.inputs["pixel_values"][:, 0] + 1) * 8
        for row in range(0, 8, 2):
            for column in range(0, 8, 2):
                block = batch.targets[:, row : row + 2, column : column + 2].float().mean((1, 2))
                shown = seen[:, row : row + 2, column : column + 2]
                assert_close(shown, block[:, None, None].expand(-1, 2, 2))


def test_trivial_answers_have_the_errors_that_the_docs_say() -> None:
    task = create_task("super-resolution")
    batch = next(task.eval_batches(4096))
    seen = (batch.inputs["pixel_values"][:, 0] + 1) / 2
    assert abs(float((seen - batch.targets / 16).square().mean()) - 0.05) < 0.005
    for waves, error in ((3, 0.41), (1, 0.14)):
        series = create_task("forecast", waves=waves)
        values = (next(series.eval_batches(4096)).targets + 0.5) * series.step - 2.5
        assert abs(float(values.square().mean()) - error) < 0.03
    outline = create_task("completion")
    batch = next(outline.eval_batches(4096))
    read, asked = (
        (part.unflatten(1, (-1, 2)) + 0.5) * outline.step for part in (batch.inputs["input_ids"], batch.targets)
    )
    assert abs(float((read.mean(1, keepdim=True) - asked).square().mean()) - 0.5) < 0.02


def test_what_is_asked_of_an_outline_lies_on_it() -> None:
    """r(a) is a trigonometric polynomial of order three: seven points of what is read tell the rest."""
    task = create_task("completion", levels=65_536)
    batch = next(task.train_batches(20, 0))
    waves = torch.arange(1, 4, dtype=torch.float64)

    def polar(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = ((tokens.double() + 0.5) * task.step - 1).unflatten(0, (-1, 2)).unbind(-1)
        angle = torch.atan2(y, x)
        rows = angle[:, None] * waves
        return torch.cat([torch.ones(len(x), 1), rows.cos(), rows.sin()], 1), torch.hypot(x, y)

    for read, asked in zip(batch.inputs["input_ids"], batch.targets, strict=True):
        known, radius = polar(read)
        terms, wanted = polar(asked)
        assert_close(terms @ torch.linalg.lstsq(known, radius[:, None]).solution[:, 0], wanted, rtol=0, atol=0.02)
        (gap,) = {round(float(step), 2) for step in torch.atan2(*_turns(asked, task.step))}
        assert gap == round(2 * torch.pi * 0.4 / task.horizon, 2)


def _turns(tokens: torch.Tensor, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sines and cosines of the angles between neighbours."""
    x, y = ((tokens.double() + 0.5) * step - 1).unflatten(0, (-1, 2)).unbind(-1)
    return x[:-1] * y[1:] - y[:-1] * x[1:], x[:-1] * x[1:] + y[:-1] * y[1:]


def test_hidden_bytes_alone_are_asked_for() -> None:
    task, text = create_task("masked-text", n=32, rate=0.2), create_task("text", n=32)
    batch, plain = next(task.eval_batches(500)), next(text.eval_batches(500))
    ids = batch.inputs["input_ids"]
    hidden = ids == 256
    assert torch.equal(torch.where(hidden, batch.targets, ids), plain.inputs["input_ids"])
    assert torch.equal(hidden, batch.targets != -100)
    assert bool(hidden.any(1).all())
    assert abs(float(hidden.float().mean()) - 0.2) < 0.02
    one = next(create_task("masked-text", n=8, rate=1e-9).train_batches(50, 0))
    assert (one.targets != -100).sum(1).tolist() == [1] * 50


def test_seven_tasks_stand_for_the_benchmark() -> None:
    assert sum(map(len, CAB.values())) == 7
    for pattern, names in CAB.items():
        assert {task_class(name).pattern for name in names} == {pattern}


@pytest.mark.parametrize("name", ["forecast", "super-resolution", "completion", "masked-text"])
def test_a_model_takes_the_stand_ins(name: str) -> None:
    task = create_task(name)
    model = build_model(task, {"name": "softmax"}, SIZE)
    batch = next(task.train_batches(2, 0))
    loss_of(task.aligned(model(**batch.inputs).logits), batch.targets).backward()
    assert 0 < evaluate(task, model, torch.device("cpu")).value < 9


@pytest.mark.parametrize("name", ["forecast", "super-resolution", "completion", "masked-text"])
def test_stand_ins_are_drawn_fast_enough(name: str) -> None:
    batches = create_task(name).train_batches(64, 0)
    next(batches)
    began = time.process_time()
    tokens = sum(sum(part.numel() for part in batch.inputs.values()) for batch in islice(batches, 5))
    assert tokens / (time.process_time() - began) > 1e5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "forecast", "horizon": 97}, "horizon=97"),
        ({"name": "forecast", "levels": 3}, "levels=3"),
        ({"name": "forecast", "waves": 0}, "waves=0"),
        ({"name": "forecast", "noise": -1}, "noise=-1"),
        ({"name": "forecast", "n": 1}, "n=1"),
        ({"name": "completion", "points": 0}, "points=0"),
        ({"name": "masked-text", "rate": 0}, "rate=0; want a share above 0"),
        ({"name": "masked-text", "rate": True}, "rate=True"),
    ],
)
def test_what_cannot_be_drawn_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task(**given)
