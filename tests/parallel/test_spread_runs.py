"""Runs of the verbs whose cells go to the workers of a Dask cluster: the same figures, kept, and none run twice."""

from pathlib import Path
from typing import Any

import pytest

from manyheads.explain.studies import run_study
from manyheads.explain.studies import running as studying
from manyheads.hosts.loading import load_model
from manyheads.hosts.questions import Questions
from manyheads.runs import outcome
from manyheads.shrink import run as shrinking
from manyheads.shrink.plan import Plan, Sizes
from manyheads.shrink.variants import Profiles, read_variants

STUDY: dict[str, Any] = {"ratios": (1, 10), "steps": 3}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every cell that was really run."""
    found: list[int] = []

    def counting(measure: Any) -> Any:
        found.append(1)
        return outcome.outcome_of(measure)

    for module in (studying, shrinking):
        monkeypatch.setattr(module, "outcome_of", counting)
    monkeypatch.setattr("manyheads.runs.page._libraries", lambda: "")
    return found


def figures(results: dict[str, Any], *names: str) -> list[list[Any]]:
    return [[cell["status"], *(cell.get(name) for name in names)] for cell in results["cells"]]


def test_a_study(tmp_path: Path, scheduler: str, ran: list[int]) -> None:
    spread = run_study("scan-and-snap", tmp_path / "a", seeds=1, settings=STUDY, scheduler=scheduler)
    cells = len(spread["cells"])
    assert len(ran) == cells > 1
    (next((tmp_path / "a" / "cells").glob("study-*.json"))).unlink()
    again = run_study("scan-and-snap", tmp_path / "a", seeds=1, settings=STUDY, scheduler=scheduler)
    assert len(ran) == cells + 1
    here = run_study("scan-and-snap", tmp_path / "b", seeds=1, settings=STUDY)
    names = [name for name in here["cells"][0] if name not in ("seconds", "machine")]
    assert figures(spread, *names) == figures(again, *names) == figures(here, *names)


def test_a_shrunk_model(tmp_path: Path, scheduler: str, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model()
    sizes = Sizes((128,), 1, (0.5,), 1, 1)
    plan = Plan(read_variants(["streaming"], [("compression_ratio", 0.5)], Profiles(loaded, None)), ("passkey",), sizes)
    study = shrinking.Study(loaded, plan, Questions(loaded, text="Some words to read. " * 100))
    spread = shrinking.run_study(study, tmp_path / "a", scheduler=scheduler)
    here = shrinking.run_study(study, tmp_path / "b")
    names = ("accuracy", "answers", "cache_bytes", "dense_cache_bytes")
    assert figures(spread, *names) == figures(here, *names)
    assert [row[0] for row in figures(here)] == ["done"] * 3
    assert len(ran) == 6
    shrinking.run_study(study, tmp_path / "a", scheduler=scheduler)
    assert len(ran) == 6
    # What the worker opens by that name is another model.
    monkeypatch.setattr(shrinking, "load_model", lambda *_, **options: _other(load_model(**options)))
    shrinking._opened.cache_clear()
    apart = shrinking.run_study(study, tmp_path / "c", scheduler=scheduler)
    assert {cell["status"] for cell in apart["cells"]} == {"failed"}
    assert "its model, text or sources are not those" in apart["cells"][0]["error"]
    shrinking._opened.cache_clear()


def _other(loaded: Any) -> Any:
    next(loaded.model.parameters()).data += 1
    return loaded
