"""The tables of the field's benchmarks, from made-up results; and how their rows come about."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from manyheads.tasks import create_task

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("page")


@pytest.fixture
def field(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("field")


def row(part: str, mechanism: str, column: str, value: float | None, **more: Any) -> dict[str, Any]:
    usual = {"metric": "accuracy", "higher_is_better": True, "value_error": 0.01, "seeds": 1, "trivial": 0.25}
    return {"part": part, "mechanism": mechanism, "column": column, "value": value, **usual, **more}


def test_a_table_for_each_part_best_first(page: ModuleType) -> None:
    bits = {"metric": "bits_per_base", "higher_is_better": False, "trivial": 2.0}
    rows = [
        row("causal", "softmax", "counting", 0.5),
        row("causal", "based", "counting", 0.625, seeds=3, value_error=0.0123),
        row("causal", "softmax", "nucleotides", 1.75, **bits, in_time=False),
        row("causal", "based", "nucleotides", 1.875, **bits),
        row("recall", "gqa", "width 16", 0.26, state_bytes=2048),
        row("cab", "gqa", "index, all seven", -0.125, metric="index"),
        row("cab", "mqa", "index, all seven", 0.5, metric="index", seeds=3, value_error=0.25),
    ]
    text = "\n".join(page._field(rows))
    assert text.index("| based | 62.5% ± 1.2 | 1.875 |") < text.index("| softmax | 50.0% | 1.750* |")
    assert "| gqa | 26.0% (2.0 KiB) |" in text
    assert "| gqa | -0.12 |" in text
    assert "| mqa | +0.50 ± 0.25 |" in text
    assert "- width 16: nobody learnt it in these steps; the trivial answer has 0.250" in text
    assert "counting: nobody" not in text
    assert "nucleotides: nobody" not in text


def test_who_has_no_score_stands_there_with_the_reason(page: ModuleType) -> None:
    why = "what it learnt ends at n 64"
    rows = [row("beyond", "softmax", "n 128", 0.5), row("beyond", "rcmha", "n 128", None, error=why)]
    lines = page._field(rows)
    assert "| rcmha | cannot |" in lines
    assert lines.index("| softmax | 50.0% |") < lines.index("| rcmha | cannot |")
    assert f"- cannot: rcmha: {why}" in lines


def test_the_trivial_answer_is_the_commonest_one(field: ModuleType) -> None:
    task = create_task("functions", kind="conjunction", bits=4, points=6, eval_examples=64)
    (batch,) = task.eval_batches(64)
    ones = [int(value) for value in batch.targets[batch.targets != -100] - 2]
    assert field.trivial(task) == pytest.approx(max(sum(ones), len(ones) - sum(ones)) / len(ones))


def test_rows_are_means_over_seeds_and_failures_keep_their_words(field: ModuleType) -> None:
    done = {"mechanism": "softmax", "n": 8, "metric": "accuracy", "higher_is_better": True, "stopped": "at the last"}
    cells = [{**done, "value": value, "value_error": 0.5} for value in (0.5, 0.75, 1.0)]
    cells[2]["stopped"] = "after 12.0 seconds"
    cells.append({"mechanism": "based", "value": None, "error": "training diverged"})
    first, second = field.rows_of("causal", "counting", cells, trivial=0.25)
    assert (first["value"], first["value_error"], first["seeds"], first["in_time"]) == (0.75, 0.25, 3, False)
    assert (second["value"], second["error"]) == (None, "training diverged")


def test_an_index_is_the_mean_over_seeds_of_each_seeds_own(field: ModuleType) -> None:
    """With three mechanisms at 1, 2 and 3 the deviations are -1, 0 and 1, turned round in the third seed."""
    names = [task for own in field.CAB.values() for task in own]
    cells = [
        {"kind": "quality", "status": "done", "mechanism": name, "task": task, "seed": seed, "value": value * turn,
         "metric": "accuracy", "higher_is_better": True, "parameters": 1, "steps": 1, "best": True, "value_error": 0.0,
         "learning_rate": 0.1, "seconds": 1.0}
        for seed, turn in ((0, 1.0), (1, 10.0), (2, -1.0))
        for name, value in (("softmax", 3.0), ("gqa", 2.0), ("mqa", 1.0))
        for task in names
    ]  # fmt: skip
    found = field.indices("cab", {"cells": cells})
    whole = {row["mechanism"]: row for row in found if row["column"] == "index, all seven"}
    assert whole["softmax"]["value"] == pytest.approx(1 / 3)
    assert whole["softmax"]["value_error"] == pytest.approx((4 / 3) ** 0.5)
    assert (whole["gqa"]["value"], whole["gqa"]["seeds"]) == (0, 3)


def test_every_entry_is_an_experiment_that_can_be_asked(field: ModuleType) -> None:
    for entries in (field.CAUSAL, field.BEYOND):
        for entry in entries.values():
            made = field.create_experiment({"mechanisms": ["softmax"], "tasks": [entry], "sections": ["quality"]})
            assert made.tasks[0].training.seconds == entry["training"]["seconds"] <= 30.0
    named = {*field.LONGER, *field.STATES, *field.READERS, *field.CONTESTANTS}
    wide = [field.parse_name(name) for name in sorted(named)]
    tasks = [field.WIDE, field.GCOG, *(field.task(name, **more, **field.LEARNT) for name, more in field.SEVEN.items())]
    assert len(field.create_experiment({"mechanisms": wide, "tasks": tasks, "sections": ["quality"]}).tasks) == 9
