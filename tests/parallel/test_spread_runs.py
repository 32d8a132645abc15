"""Runs of the verbs whose cells go to the workers of a Dask cluster: the same figures, kept, and none run twice."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.cli import main
from manyheads.convert import damage, sweep
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

    for module in (studying, shrinking, sweep):
        monkeypatch.setattr(module, "outcome_of", counting)
    monkeypatch.setattr("manyheads.runs.page._libraries", lambda: "")
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of bytes that is quick."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
    return str(folder)


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


def test_a_shrunk_model(
    tmp_path: Path, small: str, scheduler: str, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(small)
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
    monkeypatch.setattr(shrinking, "load_model", lambda name, **options: _other(load_model(name, **options)))
    shrinking._opened.cache_clear()
    apart = shrinking.run_study(study, tmp_path / "c", scheduler=scheduler)
    assert {cell["status"] for cell in apart["cells"]} == {"failed"}
    assert "its model, text or sources are not those" in apart["cells"][0]["error"]
    shrinking._opened.cache_clear()


def _other(loaded: Any) -> Any:
    next(loaded.model.parameters()).data += 1
    return loaded


SWEPT = ["--kv-heads", "2,1", "--align", "mean", "--heal", "128", "--windows", "1", "--keys", "1", "--length", "128"]


def test_a_sweep_of_conversions(
    tmp_path: Path, small: str, scheduler: str, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "TURNS", 1)
    monkeypatch.setattr(damage, "GREEDY_TOKENS", 2)
    words = [small, *SWEPT, "--calibrate", "128", "--dry-run", "--json"]
    spread, here = tmp_path / "a", tmp_path / "b"
    assert converted(*words, "--out", str(here)) == 0
    assert len(ran) == 4  # the original, two values, the control
    assert converted(*words, "--out", str(spread), "--scheduler", scheduler) == 0
    rows = [[without_times(row) for row in json.loads((out / "conversion.json").read_text())["rows"]]
            for out in (spread, here)]  # fmt: skip
    assert rows[0] == rows[1]
    assert [row["stage"] for row in rows[0]] == ["original", *["right after", "healed"] * 2, "control"]
    assert len(ran) == 8
    # Stopped before the record was written, and with one cell less.
    (spread / "conversion.json").unlink()
    next((spread / "cells").glob("convert-*.json")).unlink()
    assert converted(*words, "--out", str(spread), "--scheduler", scheduler) == 0
    assert len(ran) == 9
    assert not list(tmp_path.glob(".*"))  # no weights of a healing are left


def test_one_conversion_has_nothing_to_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--kv-heads", "2", "--dry-run"], ["--kv-heads", "2,1"]):
        assert converted(*words, "--out", str(tmp_path / "x"), "--scheduler", "tcp://127.0.0.1:1") == 2
        assert "--scheduler spreads the values of a sweep" in capsys.readouterr().err


def converted(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *words])
    return int(end.value.code or 0)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith(("_s", "_ratio")) and key != "seconds"}
