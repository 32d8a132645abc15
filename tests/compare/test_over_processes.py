"""Cells of quality whose model is trained over several processes: figures of one process, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from dask_clusters import cluster_of
from forked import ranks, together

from manyheads.compare.cells import cells_of_experiment
from manyheads.compare.experiment import create_experiment
from manyheads.compare.run import run_experiment
from manyheads.runs import processes

TASK = {"name": "recall", "n": 17, "vocabulary": 16, "pairs": 2, "eval_examples": 8}
TINY = {
    "mechanisms": ["lightning", "softmax"],
    "tasks": [TASK | {"model": {"hidden_size": 16, "layers": 1, "short_conv": 3}}],
    "training": {"steps": 3, "batch_size": 4, "eval_every": 2, "learning_rates": [0.003], "seconds": 1000.0},
    "sections": ["quality"],
}


def test_torchrun_starts_one_group() -> None:
    assert processes.in_processes(2, "torch.distributed:get_world_size") == 2


def started(command: list[str]) -> tuple[int, list[str]]:
    """What torchrun starts, in processes that need not import torch and transformers first."""
    both = together(*command[command.index("2") + 1 :], envs=ranks(2))
    return max(done.returncode for done in both), [line for done in both for line in done.stderr.splitlines()]


def test_two_processes_train_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_run", started)
    monkeypatch.setattr("manyheads.compare.charts.write_png", lambda *_: [])
    changes = TINY | {"mechanisms": ["lightning"]}
    with cluster_of(processes=False) as address:
        spread = run_experiment(create_experiment(changes | {"processes": 2}), tmp_path / "a", scheduler=address)
    (two,), (one,) = spread["cells"], run_experiment(create_experiment(changes), tmp_path / "b")["cells"]
    assert two["status"] == "done", two["error"]
    for column in ("value", "answers", "steps", "parameters"):
        assert two[column] == one[column]
    for mine, other in zip(two["curve"], one["curve"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_process_that_fails_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("2 processes ended with 1: no words")

    monkeypatch.setattr("manyheads.compare.charts.write_png", lambda *_: [])
    monkeypatch.setattr("manyheads.compare.run.in_processes", broken)
    found = run_experiment(create_experiment(TINY | {"processes": 2}), tmp_path)["cells"]
    assert [cell["error"] for cell in found] == ["RuntimeError: 2 processes ended with 1: no words"] * 2


def test_what_cannot_be_spread_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes=2 train the cells of quality, and speed"):
        create_experiment(TINY | {"processes": 2, "sections": ["quality", "speed"]})
    told = create_experiment(TINY | {"processes": 2, "mechanisms": ["softmax", "titans"], "tasks": ["recall"]})
    assert [cell.undeclared for cell in cells_of_experiment(told)][:2] == ["", "titans cannot be spread over processes"]
    shaped = create_experiment(TINY | {"processes": 2, "mechanisms": ["softmax"], "tasks": ["transduce"]})
    assert "not for causal language models" in cells_of_experiment(shaped)[0].undeclared


def test_stored_figures_of_one_process_stay() -> None:
    (one, _), (two, _) = (cells_of_experiment(create_experiment(TINY | {"processes": n})) for n in (1, 2))
    assert "processes" not in one.settings
    assert one.key != two.key
