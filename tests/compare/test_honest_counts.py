"""How many seeds a figure is of: neither one seed counted twice, nor those that failed left unsaid."""

from __future__ import annotations

from typing import Any

import pytest

from manyheads.compare.cells import cells_of_experiment
from manyheads.compare.experiment import create_experiment
from manyheads.compare.tables import headline

SMALL = {"mechanisms": ["softmax"], "sections": ["quality"], "tasks": ["recall"], "seeds": [0]}


@pytest.mark.parametrize("training", [{"learning_rates": [3e-3, 0.003]}, {"beyond": [2, 2]}])
def test_what_is_given_twice_is_run_once(training: dict[str, Any]) -> None:
    """Else the same run is two seeds, with a spread of 0.000."""
    training = {"learning_rates": [3e-3], **training}
    (cell,) = cells_of_experiment(create_experiment({**SMALL, "training": training, "model": {"positions": "none"}}))
    assert cell.settings["training"].get("beyond", [2]) == [2]


def _cell(mechanism: str, seed: int, value: float | None) -> dict[str, Any]:
    status = {"status": "done"} if value is not None else {"status": "failed", "error": "training diverged"}
    place = {"kind": "quality", "mechanism": mechanism, "task": "recall", "n": 32, "seed": seed, "learning_rate": 1e-3}
    return {**place, **status, "value": value, "best": True, "metric": "accuracy", "higher_is_better": True}


def _said(values: dict[str, list[float | None]]) -> str:
    cells = [_cell(name, seed, value) for name, seeds in values.items() for seed, value in enumerate(seeds)]
    return headline({"cells": cells})[0]


def test_a_mean_over_the_seeds_that_finished_is_called_that() -> None:
    line = _said({"a": [0.9, None, None], "b": [0.5, 0.51, 0.52]})
    assert line.startswith("Best at recall: a")
    assert "a 1 of 3" in line
    assert "others failed" in line
    assert "One seed" not in line


def test_in_a_tie_each_with_failed_seeds_is_named_and_no_other() -> None:
    line = _said({"a": [0.9, 0.8, 0.7], "b": [0.81, None, 0.79], "c": [0.1, None, None]})
    assert line.startswith("Tie at recall: a, b")
    assert "over the seeds that finished: b 2 of 3;" in line


def test_of_whole_runs_nothing_is_said() -> None:
    assert "finished" not in _said({"a": [0.9, 0.8], "b": [0.2, 0.1]})
    assert "One seed, so its spread is unknown." in _said({"a": [0.9], "b": [0.2]})
