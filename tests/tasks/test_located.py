"""Digits as a set of boxes: what is asked stands on the canvas, and a model of the right head takes and learns it."""

from __future__ import annotations

import pytest
import torch

from manyheads.compare.train import build_model, evaluate, has_place, train_cell
from manyheads.tasks import create_task, task_class
from manyheads.tasks.cluttered import CANVAS

SIZE = {"hidden_size": 16, "heads": 2, "layers": 1, "intermediate_size": 0, "short_conv": 0, "positions": "learned"}


def test_boxes_hold_all_that_is_lit_and_touch_it_on_every_side() -> None:
    batch = next(create_task("locate", distractors=0, digits=4).train_batches(30, 0))
    counts = set()
    for picture, answers in zip(batch.inputs["pixel_values"][:, 0] > -1, batch.targets, strict=True):
        left = picture.clone()
        counts.add(int((answers[:, 0] >= 0).sum()))
        for kind, x, y, wide, high in answers.tolist():
            if kind < 0:
                continue
            first, last = (round(CANVAS * (x - wide / 2)), round(CANVAS * (x + wide / 2)))
            top, bottom = (round(CANVAS * (y - high / 2)), round(CANVAS * (y + high / 2)))
            inside = picture[top:bottom, first:last]
            assert all(bool(side.any()) for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            left[top:bottom, first:last] = False
        assert not left.any()
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize("mechanism", ["softmax", "hilo", "luong"])
def test_a_mechanism_has_a_place(mechanism: str) -> None:
    if not has_place(task_class("locate"), mechanism):
        pytest.fail(f"no place for {mechanism}")
    task = create_task("locate", patch=16, eval_examples=6)
    model = build_model(task, {"name": mechanism}, SIZE)
    assert mechanism in {getattr(module, "card", None) and module.card.name for module in model.modules()}
    batch = next(task.train_batches(2, 0))
    logits = task.answered(model(**batch.inputs))
    task.loss(logits, batch.targets).backward()
    assert bool((model.embed_patches.weight.grad != 0).any())
    assert 0 <= evaluate(task, model, torch.device("cpu")).value <= 1


def test_perfect_answers_score_one() -> None:
    task = create_task("locate")
    batch = next(task.eval_batches(50))
    absent = batch.targets[..., 0] < 0
    kinds = batch.targets[..., 0].long().masked_fill(absent, 10)
    answers = torch.cat([torch.nn.functional.one_hot(kinds, 11).float(), batch.targets[..., 1:]], -1)
    total, count = task.score(answers, batch.targets)
    assert total == pytest.approx(count)
    assert count == int((~absent).sum())
    assert task.score(answers.roll(1, 0), batch.targets)[0] < 0.5 * count
    with pytest.raises(ValueError, match="locate: answers"):
        task.score(answers[..., 1:], batch.targets)


def test_compare_trains_it() -> None:
    training = {"steps": 3, "batch_size": 2, "warmup": 0.1, "schedule": "cosine", "seconds": None, "eval_every": 2}
    training |= {"weight_decay": 0.1, "clip": 1.0, "router_weight": 0.01, "stop_at": None}
    cell = {"mechanism": {"name": "softmax", "args": {}}, "model": SIZE, "seed": 0, "learning_rate": 1e-3}
    cell |= {"task": {"name": "locate", "args": {"patch": 16, "eval_examples": 4}}, "training": training}
    outcome = train_cell({**cell, "device": "cpu", "precision": "float32"})
    assert outcome["status"] == "done"
    assert outcome["metric"] == "matched overlap"
    assert outcome["curve"][-1]["step"] == 3
