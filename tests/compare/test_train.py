"""The trainer: its loss and schedule against plain arithmetic, its budget, and what it does with a model."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from manyheads.compare.train import _decayed as decayed
from manyheads.compare.train import build_model, evaluate, placed, rate_at, train_cell
from manyheads.tasks import create_task, list_tasks, task_class
from manyheads.tasks.task import loss_of

RECALL = {"name": "recall", "args": {"n": 16, "vocabulary": 16, "pairs": 2, "eval_examples": 32}}
SMALL = {"hidden_size": 16, "heads": 4, "layers": 1, "intermediate_size": 0, "short_conv": 3, "positions": "none"}
TRAINING = {"steps": 3, "seconds": None, "batch_size": 4, "eval_every": 2, "warmup": 0.1, "schedule": "cosine"}
TRAINING |= {"weight_decay": 0.1, "clip": 1.0, "router_weight": 0.01, "stop_at": 0.99}


def settings(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {"mechanism": {"name": "softmax", "args": {}}, "device": "cpu", "precision": "float32"}
    whole |= {"task": RECALL, "model": SMALL, "training": TRAINING, "seed": 0, "learning_rate": 3e-3}
    for key, value in changes.items():
        whole[key] = {**whole[key], **value} if isinstance(value, dict) else value
    return whole


def test_loss_is_the_mean_surprise_where_something_is_asked() -> None:
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -100, 4], [-100, 0, -100]])
    total, asked = 0.0, 0
    for b in range(2):
        for i in range(3):
            if targets[b, i] >= 0:
                row = [math.exp(v) for v in logits[b, i].tolist()]
                total -= math.log(row[int(targets[b, i])] / sum(row))
                asked += 1
    assert float(loss_of(logits, targets)) == pytest.approx(total / asked, rel=1e-5)
    rows = torch.tensor([2, 0])
    wanted = torch.stack([-logits[b, 0].log_softmax(0)[rows[b]] for b in range(2)]).mean()
    torch.testing.assert_close(loss_of(logits[:, 0], rows), wanted)


def test_rates_warm_up_and_come_down() -> None:
    plan: dict[str, Any] = {"steps": 100, "warmup": 0.1, "schedule": "cosine"}
    rates = [rate_at(step, plan) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert {rate_at(step, plan | {"schedule": "constant"}) for step in range(10, 100)} == {1.0}
    assert rate_at(0, plan | {"warmup": 0.0}) == 1.0


def test_outcome_of_a_few_steps() -> None:
    outcome = train_cell(settings())
    assert [point["step"] for point in outcome["curve"]] == [1, 2, 3]
    assert outcome["steps"] == 3
    assert outcome["value"] == outcome["curve"][-1]["value"]
    assert outcome["metric"] == "accuracy"
    # embedding (tied) 16 x 16, convolution 3 x 16, four projections, two gains
    assert outcome["parameters"] == 16 * 16 + 3 * 16 + 4 * 16 * 16 + 2 * 16
    assert all(0 < point["loss"] < 10 for point in outcome["curve"])


def test_same_seed_same_figures() -> None:
    first, again, other = (train_cell(settings(seed=seed)) for seed in (1, 1, 2))
    assert first["curve"] == again["curve"]
    assert first["curve"] != other["curve"]


def test_it_learns_and_stops_early() -> None:
    task = {"args": {"n": 8, "vocabulary": 8, "pairs": 1, "eval_examples": 32}}
    training = {"steps": 400, "batch_size": 32, "eval_every": 20, "stop_at": 0.9}
    outcome = train_cell(settings(task={**RECALL, **task}, training=training, model={"hidden_size": 32}))
    assert outcome["value"] >= 0.9
    assert outcome["stopped"] == "accuracy passed 0.9"
    assert outcome["steps"] < 400
    losses = [point["loss"] for point in outcome["curve"]]
    assert losses[-1] < 0.7 * losses[0]


def test_lower_is_better_is_never_stopped_early() -> None:
    task = {"name": "text", "args": {"n": 8, "eval_windows": 4, "max_bytes": 200_000}}
    outcome = train_cell(settings(task=task, training={"stop_at": 0.0}))
    assert outcome["steps"] == 3
    assert outcome["metric"] == "bits_per_byte"
    assert 4 < outcome["value"] < 9


def test_budget_in_seconds() -> None:
    outcome = train_cell(settings(training={"steps": 10_000, "seconds": 0.1, "eval_every": 10_000}))
    assert outcome["stopped"] == "after 0.1 seconds"
    assert 1 <= outcome["steps"] < 10_000
    assert outcome["curve"][-1]["step"] == outcome["steps"]


def test_divergence_is_a_failure_with_its_curve() -> None:
    outcome = train_cell(settings(learning_rate=1e30, training={"steps": 20, "warmup": 0.0}))
    assert outcome["status"] == "failed"
    assert "diverged" in outcome["error"]
    assert "smaller learning rate" in outcome["error"]
    assert outcome["curve"]


def test_weight_decay_spares_vectors() -> None:
    model = build_model(create_task("recall", **RECALL["args"]), {"name": "gqa"}, SMALL)
    decays, spared = decayed(model, 0.1)
    assert decays["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decays["params"])
    assert all(p.ndim == 1 for p in spared["params"])
    assert len(decays["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_router_losses_count() -> None:
    heavy, light = (
        train_cell(settings(mechanism={"name": "moh", "args": {}}, training={"router_weight": weight}))
        for weight in (0.0, 10.0)
    )
    assert heavy["curve"][0] == light["curve"][0] | {"value": heavy["curve"][0]["value"]}
    assert heavy["curve"][-1]["loss"] != light["curve"][-1]["loss"]


@pytest.mark.parametrize("name", list_tasks())
def test_every_task_has_its_model(name: str) -> None:
    text = {"max_bytes": 100_000, "eval_windows": 4}
    small = dict({"text": text, "masked-text": text}.get(name, {}))
    small |= {"eval_examples": 8} if hasattr(task_class(name), "eval_examples") else {}
    task = create_task(name, **small)
    torch.manual_seed(0)
    model = build_model(task, {"name": "softmax", "bias": True}, SMALL)
    mechanisms = [m for m in model.modules() if type(m).__name__ == "Softmax" and m.config["bias"]]
    assert len(mechanisms) == 1
    cross = task.pattern.endswith("cross")
    assert mechanisms[0].causal == (task.pattern in ("causal-self", "causal-cross"))
    assert (list(placed(task, {"name": "softmax"})) == ["layers", "cross_layers"]) == cross
    chance = evaluate(task, model, torch.device("cpu")).value
    assert 0 <= chance <= {"text": 9, "masked-text": 9, "nucleotides": 3, "forecast": 1}.get(name, 0.5)


def test_what_fits_only_as_pooling() -> None:
    task = create_task("digits-patches")
    assert placed(task, {"name": "efficient-probing"}) == {
        "layers": ["softmax"],
        "pooling": {"name": "efficient-probing"},
    }
    assert build_model(task, {"name": "efficient-probing"}, SMALL).config.pooling["name"] == "efficient-probing"
    with pytest.raises(ValueError, match="recall needs causal-self; efficient-probing declares pool"):
        placed(create_task("recall"), {"name": "efficient-probing"})


def test_cuda_is_wanted_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here"):
        train_cell(settings(device="cuda"))


def test_bfloat16() -> None:
    outcome = train_cell(settings(precision="bfloat16"))
    assert math.isfinite(outcome["value"])
    assert train_cell(settings())["curve"] != outcome["curve"]
