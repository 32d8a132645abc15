"""The page of measured figures is what the results say, and cards own up to what fell short."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from manyheads.compare.train import unpassed
from manyheads.registry import list_attentions, mechanism_class

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def page_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("page")


def test_the_page_is_generated_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "measured.md"
    assert page.read_text() == page_module(monkeypatch).measured_page(), (
        "run `python benchmarks/page.py > docs/measured.md`"
    )


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return found


@pytest.mark.parametrize("task", ["recall", "digits"])
def test_cards_tell_the_figure_that_fell_short(task: str) -> None:
    """Below the target, the card's notes hold the number measured, and the one of the longer run."""
    assert [row for row in rows(task) if "error" in row] == []
    short = [row for row in rows(task) if row["accuracy"] < row["target"]]
    for row in short:
        notes = mechanism_class(row["mechanism"].split("[")[0]).card.notes
        wanted = f"{100 * row['accuracy']:.0f}% on quick {task}"
        assert wanted in notes, f"{row['mechanism']}: its card's notes want {wanted!r} and the reason"
        longer = f"{100 * row['longer']:.0f}% in five times the steps"
        assert longer in notes, f"{row['mechanism']}: its card's notes want {longer!r}"


def test_no_card_tells_a_figure_that_was_not_measured() -> None:
    for task in ("recall", "digits"):
        measured = {row["mechanism"].split("[")[0]: row for row in rows(task)}
        for name in list_attentions():
            notes = mechanism_class(name).card.notes
            if f"% on quick {task}" in notes:
                assert f"{100 * measured[name]['accuracy']:.0f}% on quick {task}" in notes


@pytest.mark.parametrize("task", ["recall", "digits"])
def test_no_row_is_of_a_mechanism_that_is_gone(task: str) -> None:
    assert {row["mechanism"].split("[")[0] for row in rows(task)} <= set(list_attentions())


@pytest.mark.parametrize("task", ["recall", "digits"])
def test_no_row_is_of_a_mechanism_that_was_not_given_what_it_reads(task: str) -> None:
    assert [row["mechanism"] for row in rows(task) if unpassed(row["mechanism"].split("[")[0])] == []


def test_cards_tell_which_package_is_faster() -> None:
    """A fifth or more at any length; less than that differs from run to run."""
    for row in rows("peers"):
        if row.get("ratio", 0.0) > 1.2:
            package, notes = row["peer"].split("==")[0], mechanism_class(row["mechanism"]).card.notes
            assert package in notes, f"{row['mechanism']} takes {row['ratio']:.2f} times as long as {package}"


def test_tables_of_relations_and_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_module(monkeypatch)
    shared = {"mechanism": "supergat", "sees": "edges", "chance": 0.25}
    learnt = {"value": 0.5, "value_error": 0.01, "seeds": 2, "parameters": 1234, "seconds": 9.7, "steps": 200}
    failed = {**shared, "task": "far-away", "value": None, "error": "ValueError: none"}
    lines = page._relations([failed, {**shared, **learnt, "task": "far-away"}])
    assert lines[2].split(" | ")[3:] == ["1,234", "50.0%", "1.0", "2", "10 |"]
    assert "ValueError: none" in lines[3]
    kinds = {row["what"] for row in rows("vision")} | {"graph peer", "graph memory", "graph by hand"}
    for what in kinds:
        (line,) = page._vision(
            [{"what": what, "mechanism": "m", "ratio": 0.5, "exponent": 0.5, "ms": 0.5, "seconds": 0.5, "target": 1.0}]
        )[2:]
        assert line.endswith("| 0.5 | 1 |")
