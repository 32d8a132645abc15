"""CAB's seven tasks as one, and the index over them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manyheads.cli import main
from manyheads.compare.composed import ALL, compositional
from manyheads.compare.experiment import create_experiment
from manyheads.tasks.cab import CAB

TASKS = [task for tasks in CAB.values() for task in tasks]
LOWER = {"masked-text", "super-resolution", "text", "forecast", "completion"}


def rows_of(values: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    return [
        {
            "mechanism": name,
            "quality": {
                task: {"mean": own.get(task), "higher_is_better": task not in LOWER}
                for task in [*TASKS[:-1], TASKS[-1]]
            },
        }
        for name, own in values.items()
    ]


def test_the_index_is_the_mean_of_deviations() -> None:
    values: dict[str, dict[str, float | None]] = {
        "a": dict.fromkeys(TASKS, 1.0), "b": dict.fromkeys(TASKS, 2.0), "c": dict.fromkeys(TASKS, 3.0)
    }  # fmt: skip
    found = compositional(rows_of(values))
    assert found["b"] == dict.fromkeys([*CAB, ALL], 0.0)
    assert found["c"]["noncausal-self"] == found["c"]["noncausal-cross"] == pytest.approx(-1)
    assert found["c"]["causal-cross"] == pytest.approx(1)
    assert found["c"]["causal-self"] == pytest.approx(0)  # text down, recall up
    assert found["c"][ALL] == pytest.approx(-3 / 7)
    values["c"]["text"] = None
    found = compositional(rows_of(values))
    assert ALL not in found["c"]
    assert "causal-self" not in found["c"]
    assert found["c"]["causal-cross"] == pytest.approx(1)
    assert ALL not in found["a"], "two have no deviation"


def test_other_tasks_have_none() -> None:
    rows = rows_of({name: dict.fromkeys(TASKS, float(i)) for i, name in enumerate("abc")})
    for row in rows:
        del row["quality"]["forecast"]
    assert compositional(rows) == {}


def test_the_seven_are_asked_for_by_one_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr("manyheads.compare.charts.write_png", lambda *_: [])
    monkeypatch.setattr("manyheads.runs.page._libraries", lambda: "")
    assert [task.name for task in create_experiment({"tasks": ["cab"], "mechanisms": ["softmax"]}).tasks] == TASKS
    path = tmp_path / "small.yaml"
    path.write_text(
        "mechanisms: [softmax]\nsections: [quality]\n"
        "training: {steps: 1, batch_size: 2}\nmodel: {hidden_size: 16, heads: 2, layers: 1}\n"
    )
    with pytest.raises(SystemExit) as end:
        main(["compare", "--experiment", str(path), "--task", "cab", "--out", str(tmp_path / "out"), "--json"])
    assert end.value.code == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert set(summary[0]["quality"]) == set(TASKS)
