"""Whole runs: what is run, kept, resumed and told, in one process, after a kill, and on a Dask cluster."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from dask_clusters import cluster_of
from forked import Program
from rich.console import Console
from typer.testing import CliRunner

from manyheads.compare import worker
from manyheads.compare.cells import cells_of_experiment
from manyheads.compare.command import compare
from manyheads.compare.experiment import Experiment, create_experiment
from manyheads.compare.run import mark_best, run_experiment
from manyheads.compare.summary import summarise
from manyheads.runs import cluster
from manyheads.runs.cells import Cell
from manyheads.runs.loop import Chain
from manyheads.runs.progress import Estimate, Progress, duration

TASK = {"name": "recall", "n": 16, "vocabulary": 16, "pairs": 2, "eval_examples": 8}
TINY = {
    "mechanisms": ["softmax", "gqa"],
    "tasks": [TASK | {"model": {"hidden_size": 16, "layers": 1}}],
    "training": {"steps": 3, "batch_size": 4, "eval_every": 2, "learning_rates": [0.003]},
    "sections": ["quality", "speed", "decode"],
    "speed": {"hidden_size": 16, "lengths": [8, 16], "turns": 1, "repeats": 1},
    "memory": {"hidden_size": 16, "lengths": [16]},
    "decode": {"hidden_size": 16, "contexts": [8, 16], "turns": 1, "tokens": 2},
}


def tiny(**changes: Any) -> Experiment:
    return create_experiment({**TINY, **changes})


@pytest.fixture(autouse=True)
def _short_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyheads.compare.measure._GATE_LENGTH", 40)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """They take most of the time of so small a run; one test makes them."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("manyheads.compare.charts.write_png", lambda *_: [])


@pytest.fixture
def pictures() -> None:
    """Asked for by the test that wants them."""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the cells that were really run, in order."""
    kinds: list[str] = []

    def counting(kind: str, real: Any) -> Any:
        return lambda settings: (kinds.append(kind), real(settings))[1]

    for kind, real in list(worker._RUNNERS.items()):
        monkeypatch.setitem(worker._RUNNERS, kind, counting(kind, real))
    return kinds


def by_kind(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        found.setdefault(cell["kind"], []).append(cell)
    return found


def test_a_run_writes_everything_and_is_not_repeated(
    tmp_path: Path, ran: list[str], pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_experiment(tiny(), tmp_path)
    assert ran == ["quality"] * 2 + ["speed"] * 4 + ["decode"] * 4
    assert all(cell["status"] == "done" for cell in results["cells"])
    assert all(cell["best"] for cell in by_kind(results)["quality"])
    assert results["experiment"]["tasks"][0]["training"]["steps"] == 3
    for name in ("results.json", "results.csv", "report.html", "experiment.json"):
        assert (tmp_path / name).stat().st_size > 100
    assert list(tmp_path.glob("*.png"))
    assert [row["mechanism"] for row in summarise(results)] == ["softmax", "gqa"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/10] quality of softmax, recall, n 16, seed 0, lr 0.003: accuracy")
    assert "left" in lines[0]
    assert "left" not in lines[-1]

    ran.clear()
    again = run_experiment(tiny(), tmp_path)
    assert ran == []
    assert again["cells"] == results["cells"]
    more = run_experiment(tiny(mechanisms=["softmax", "mqa"], sections=["quality"]), tmp_path)
    assert ran == ["quality"]
    assert [cell["mechanism"] for cell in more["cells"]] == ["softmax", "mqa"]


def failing(kind: str, settings: Any) -> dict[str, Any]:
    return {"status": "failed", "error": "no luck", "seconds": 0.1, "traceback": "secret path"}


def test_failures_are_rows_and_retried_when_asked(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_cell", failing)
        results = run_experiment(tiny(sections=["quality"]), tmp_path)
    assert [(c["status"], c["error"]) for c in results["cells"]] == [("failed", "no luck")] * 2
    assert "secret" not in (tmp_path / "results.json").read_text()
    assert run_experiment(tiny(sections=["quality"]), tmp_path)["cells"][0]["status"] == "failed"
    assert ran == []
    mended = run_experiment(tiny(sections=["quality"]), tmp_path, retry_failed=True)
    assert ran == ["quality"] * 2
    assert {c["status"] for c in mended["cells"]} == {"done"}


def test_what_is_raised_in_a_cell_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(settings: Any) -> dict[str, Any]:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(worker._RUNNERS, "quality", crash)
    results = run_experiment(tiny(), tmp_path)
    found = by_kind(results)
    assert {c["error"] for c in found["quality"]} == {"RuntimeError: first line"}
    assert {c["status"] for c in found["speed"]} == {"done"}


def test_undeclared_patterns_are_rows_without_work(tmp_path: Path, ran: list[str]) -> None:
    results = run_experiment(tiny(mechanisms=["hilo"], sections=["quality", "decode"]), tmp_path)
    assert ran == []
    assert {c["status"] for c in results["cells"]} == {"undeclared"}
    assert "recall needs causal-self; hilo declares" in results["cells"][0]["error"]
    assert not list((tmp_path / "cells").glob("*.json"))


def test_after_too_slow_a_length_the_rest_is_not_tried(tmp_path: Path, ran: list[str]) -> None:
    slow = tiny(sections=["speed"], speed=TINY["speed"] | {"limit_seconds": 1e-7})  # type: ignore[operator]
    for _ in range(2):  # the second time from what is stored
        cells = run_experiment(slow, tmp_path)["cells"]
        assert [c["status"] for c in cells] == ["done", "failed"] * 2
        assert cells[1]["error"].startswith("not tried: n 8 took")
    assert ran == ["speed"] * 2


def test_chains_hand_out_what_is_known() -> None:
    a, b, c = (Cell("speed", "gqa", {"n": n}, {"n": n}, "x") for n in (1, 2, 3))
    chain = Chain([a, b, c], {a.key: {"status": "done"}})
    assert chain.take() == (a, {"status": "done"})
    assert chain.take() == (b, None)
    chain.finished({"status": "failed", "stop": "enough"})
    cell, outcome = chain.take() or (None, None)
    assert cell is c
    assert outcome == c.row | {"status": "failed", "error": "not tried: enough"}
    assert chain.take() is None


def test_interrupted_runs_say_how_to_go_on(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counting = worker._RUNNERS["quality"]

    def interrupted(settings: Any) -> dict[str, Any]:
        if len(ran) == 1:
            raise KeyboardInterrupt
        return counting(settings)

    with monkeypatch.context() as patch:
        patch.setitem(worker._RUNNERS, "quality", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(tiny(sections=["quality"]), tmp_path)
    told = capsys.readouterr().err
    assert "stopped with 1 of 2 cells finished and kept" in told
    assert "run the same command again" in told
    run_experiment(tiny(sections=["quality"]), tmp_path)
    assert len(ran) == 2


KILLED = """
import sys, time
from manyheads.compare import worker
from manyheads.compare.experiment import create_experiment, read_experiment
from manyheads.compare.run import run_experiment
real = worker.run_cell
def slowly(kind, settings):
    time.sleep(0.3)  # so that the kill falls into the run
    return real(kind, settings)
worker.run_cell = slowly
run_experiment(create_experiment(read_experiment(sys.argv[1])), sys.argv[2])
"""


def test_a_killed_run_repeats_nothing(tmp_path: Path, ran: list[str]) -> None:
    (tmp_path / "e.yaml").write_text(json.dumps(TINY))
    out = tmp_path / "out"
    process = Program("-c", KILLED, tmp_path / "e.yaml", out)
    try:
        deadline = time.monotonic() + 300
        while len(list(out.glob("cells/*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in out.glob("cells/*.json")}
    assert 3 <= len(kept) < 10
    results = run_experiment(create_experiment(TINY), out)
    assert len(ran) == 10 - len(kept)
    assert {path: path.read_bytes() for path in kept} == kept
    assert {cell["status"] for cell in results["cells"]} == {"done"}


def test_times_from_elsewhere_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_experiment(tiny(sections=["decode"]), tmp_path)
    for path in (tmp_path / "cells").glob("*.json"):
        held = json.loads(path.read_text())
        held["cell"]["machine"]["threads"] = 77
        path.write_text(json.dumps(held))
    capsys.readouterr()
    run_experiment(tiny(sections=["decode"]), tmp_path)
    assert "warning: 4 stored cells were measured elsewhere" in capsys.readouterr().err


# -- choosing the learning rate -----------------------------------------------------------------------------------


def quality(rate: float, seed: int, value: float | None, **more: Any) -> dict[str, Any]:
    cell = {"kind": "quality", "mechanism": "a", "task": "t", "n": 8, "learning_rate": rate, "seed": seed}
    return cell | {"status": "failed" if value is None else "done", "value": value} | more


@pytest.mark.parametrize(
    ("cells", "chosen"),
    [
        ([quality(1, 0, 0.5), quality(2, 0, 0.6)], 2),
        ([quality(1, 0, 0.5, higher_is_better=False), quality(2, 0, 0.6, higher_is_better=False)], 1),
        ([quality(1, 0, 0.9), quality(1, 1, 0.1), quality(2, 0, 0.6), quality(2, 1, 0.6)], 2),
        ([quality(1, 0, 0.9), quality(1, 1, None), quality(2, 0, 0.2), quality(2, 1, 0.2)], 2),
        ([quality(1, 0, None), quality(2, 0, 0.0)], 2),
        ([quality(1, 0, float("nan")), quality(2, 0, 0.0)], 2),
    ],
)
def test_best_learning_rate(cells: list[dict[str, Any]], chosen: float) -> None:
    other = quality(9, 0, 0.1) | {"mechanism": "b"}
    mark_best([*cells, other])
    assert {cell["learning_rate"] for cell in cells if cell["best"]} == {chosen}
    assert all(cell["best"] == (cell["learning_rate"] == chosen) for cell in cells)
    assert other["best"]


# -- progress -----------------------------------------------------------------------------------------------------


def test_time_left_comes_from_the_closest_likeness() -> None:
    a8, a16, b8, b16 = (Cell("speed", m, {"n": n}, {"m": m, "n": n}, "") for m in "ab" for n in (8, 16))
    estimate = Estimate()
    assert estimate.left([a8, b8]) == (0.0, 2)
    estimate.learn(a8, 2.0)
    estimate.learn(a16, 10.0)
    assert estimate.left([b8, b16]) == (12.0, 0)  # by length, not by kind
    assert estimate.left([b8, b16], at_once=2) == (6.0, 0)
    assert estimate.left([Cell("speed", "c", {"n": 99}, {}, "")]) == (6.0, 0)
    assert estimate.left([Cell("decode", "a", {"context": 8}, {}, "")]) == (0.0, 1)
    assert [duration(s) for s in (3.2, 100, 5000, 7200)] == ["3 s", "2 min", "83 min", "2.0 h"]


def test_progress_on_a_terminal_is_one_bar(tmp_path: Path) -> None:
    cells = cells_of_experiment(tiny(sections=["decode"]))
    console = Console(force_terminal=True, width=120, file=(tmp_path / "t").open("w"), highlight=False)
    progress = Progress(cells, console=console)
    progress.begin(cells[0])
    progress.end(cells[0], {"status": "done", "seconds": 60.0, "seconds_per_token": 1e-3})
    progress.end(cells[1], {"status": "failed", "seconds": 60.0, "error": "[bold]no[/bold]"})
    assert progress.time_left() == "about 2 min left"
    progress.close()
    console.file.close()
    text = (tmp_path / "t").read_text()
    assert "2/4" in text
    assert "decode of softmax, context 16, turn 1: failed: [bold]no[/bold]" in text


# -- Dask ---------------------------------------------------------------------------------------------------------


def test_a_cluster_gives_what_one_process_gives(tmp_path: Path, scheduler: str, ran: list[str]) -> None:
    chosen = tiny(sections=["quality", "decode"])
    spread = run_experiment(chosen, tmp_path / "a", scheduler=scheduler)
    assert sorted(ran) == ["decode"] * 4 + ["quality"] * 2
    here = run_experiment(chosen, tmp_path / "b")
    for kind, columns in (("quality", ("value", "steps", "parameters")), ("decode", ("state_bytes",))):
        pairs = zip(by_kind(spread)[kind], by_kind(here)[kind], strict=True)
        for one, other in pairs:
            assert [one[c] for c in columns] == [other[c] for c in columns]
    ran.clear()
    run_experiment(chosen, tmp_path / "a", scheduler=scheduler)
    assert ran == []


def test_a_worker_that_dies_leaves_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deadly(kind: str, settings: Any) -> dict[str, Any]:
        if kind == "speed":
            os._exit(1)
        return {"status": "done", "error": None, "seconds_per_token": 1.0, "state_bytes": 1, "seconds": 0.0}

    monkeypatch.setattr(worker, "run_cell", deadly)
    with cluster_of(processes=True, failures=0) as address:
        chosen = tiny(mechanisms=["gqa"], sections=["speed", "decode"])
        found = by_kind(run_experiment(chosen, tmp_path, scheduler=address))
    assert {c["status"] for c in found["decode"]} == {"done"}
    words = "every worker that ran this cell died, most likely for lack of memory"
    assert [c["error"] for c in found["speed"]] == [words, f"not tried: {words}"]


def test_workers_of_another_version(tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "version", lambda: "0.0.7")
    with pytest.raises(ValueError, match=r"workers have other versions than .*0\.0\.7"):
        run_experiment(tiny(), tmp_path, scheduler=scheduler)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1:no"])
def test_no_scheduler_there(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.5)
    with pytest.raises(ValueError, match="no Dask scheduler answers at"):
        run_experiment(tiny(), tmp_path, scheduler=address)


# -- the command --------------------------------------------------------------------------------------------------

app = typer.Typer()
app.command()(compare)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_command_prints_json_only_on_stdout(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(json.dumps(TINY))
    out = str(tmp_path / "out")
    shown = command("--experiment", str(tmp_path / "e.yaml"), "--section", "decode", "--out", out, "--json")
    assert shown.exit_code == 0
    told = json.loads(shown.stdout)
    assert told["files"]["report"] == f"{out}/report.html"
    assert [row["mechanism"] for row in told["summary"]] == ["softmax", "gqa"]
    assert "[4/4] decode of gqa, context 16" in shown.stderr
    named = command("gqa", "--experiment", str(tmp_path / "e.yaml"), "--section", "decode", "--out", out)
    assert named.exit_code == 0
    assert f"report: {out}/report.html" in named.stdout
    assert "softmax  " not in named.stdout


def test_command_fails_where_nothing_could_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "run_cell", failing)
    (tmp_path / "e.yaml").write_text(json.dumps(TINY))
    arguments = ["--experiment", str(tmp_path / "e.yaml"), "--out", str(tmp_path / "out")]
    assert command(*arguments).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sofmax"], "unknown mechanism 'sofmax'; did you mean 'softmax'"),
        (["moba[blok=3]"], "moba has no argument 'blok'"),
        (["--task", "recal"], "unknown task 'recal'"),
        (["--seeds", "x"], "--seeds 'x': want how many"),
        (["--preset", "fast"], "unknown preset 'fast'"),
        (["--section", "sped"], "sections.0"),
        (["--experiment", "none.yaml"], "--experiment none.yaml cannot be read"),
    ],
)
def test_what_a_user_got_wrong_is_a_value_error(arguments: list[str], words: str, tmp_path: Path) -> None:
    shown = command(*arguments, "--out", str(tmp_path / "out"))
    assert isinstance(shown.exception, ValueError)  # which the command line's `main` prints, with exit code 2
    assert words in str(shown.exception)
    assert not (tmp_path / "out").exists()
