"""Figures that ship, and `list` that shows, sorts and filters them."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from manyheads import list_attentions
from manyheads.catalogue.columns import COLUMNS, sort_rows, where_rows, written
from manyheads.catalogue.figures import load_figures, parse_figures
from manyheads.catalogue.index import names
from manyheads.cli import main

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("figures")


def test_what_ships_is_what_the_results_say(figures: ModuleType) -> None:
    assert figures.TARGET.read_text() == figures.text(), "run `python benchmarks/figures.py`"
    assert set(load_figures().rows) <= set(list_attentions())


def test_a_summary_is_read_off_the_committed_results() -> None:
    """From the files themselves, by another way."""

    def rows(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())["rows"]
        return found

    for name in list_attentions():
        told = load_figures().summary(name)
        for key in ("recall", "digits"):
            measured = [row["accuracy"] for row in rows(key) if row["mechanism"].split("[")[0] == name]
            assert told[key] == (pytest.approx(measured[0], rel=1e-4) if measured else None)
        slopes = [row for row in rows("linear") + rows("vision") if row.get("mechanism") == name and "exponent" in row]
        assert told["exponent"] == (pytest.approx(slopes[0]["exponent"], rel=1e-4) if slopes else None)
        held = slopes[0].get("state_bytes_64k") if slopes else None
        assert told["bytes"] == held
        ratios = {
            (row["n"], row["peer"]): row["ratio"]
            for row in rows("peers")
            if row["mechanism"] == name and row.get("pass") == "forward"
        }
        longest = max((n for n, _ in ratios), default=0)
        worst = max((ratio for (n, _), ratio in ratios.items() if n == longest), default=None)
        assert told["peer"] == (None if worst is None else pytest.approx(worst, rel=1e-4))


def test_figures_of_another_format_are_refused() -> None:
    for text in ('{"format": 2, "sources": {}, "rows": {}}', "[]", "{}"):
        with pytest.raises(ValueError, match="this release reads 1"):
            parse_figures(text)


def row(name: str, **changes: Any) -> dict[str, Any]:
    blank = {key: None if kept.write else "" for key, kept in COLUMNS.items()}
    return {**blank, "patterns": [], "decodes": True, "name": name, **changes}


ROWS = [
    row("a", state="1", recall=0.95, patterns=["causal-self", "grid"], bytes=13_000),
    row("b", state="n", recall=0.99, title="Of Memory"),
    row("c", state="1"),
    row("d", state="1", recall=0.2, decodes=False, bytes=1_210_000),
]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("state=1 recall>.9", "a"),
        ("state=1", "ac"),  # d does not decode: it has no state
        ("recall >= 95%", "ab"),
        ("recall<1 recall!=.2", "ab"),
        ("recall=", "c"),
        ("recall!=", "abd"),
        ("pattern=grid", "a"),
        ("pattern!=grid", "bcd"),
        ("pattern~causal", "a"),
        ("title~'of mem'", "b"),
        ("title='Of Memory'", "b"),
        ("bytes<1e6", "a"),
    ],
)
def test_where(text: str, names: str) -> None:
    assert "".join(found["name"] for found in where_rows(ROWS, text)) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "--where is empty"),
        ("recal>.9", "no column 'recal'; did you mean 'recall'.*there are name, family"),
        ("recall>much", "recall is a number"),
        ("recall>nan", "recall is a number"),
        ("recall~9", "recall is a number"),
        ("recall>", "recall is a number"),
        ("recall>2", "recall is a share from 0 to 1; want recall>2% or a number up to 1"),
        ("state<2", "state is a text, which has no <"),
        ("state=1, recall>.9", "no mechanism here has state '1,'; did you mean '1'.*there are 1, n"),
        ("pattern=gird", "no mechanism here has pattern 'gird'; did you mean 'grid'"),
        ("recall", "is no term"),
        ("title='of", "close what is quoted"),
        ("__import__('os')", "is no term"),
    ],
)
def test_where_refuses(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        where_rows(ROWS, text)


def test_sorting_puts_the_best_first_and_the_unmeasured_last() -> None:
    def order(name: str) -> str:
        return "".join(found["name"] for found in sort_rows(ROWS, name))

    assert (order("recall"), order("-recall")) == ("badc", "dabc")
    assert (order("bytes"), order("name"), order("-name")) == ("adbc", "abcd", "dcba")
    with pytest.raises(ValueError, match="there are name"):
        order("nothing")


def test_cells_are_blank_where_nothing_was_measured() -> None:
    assert [written(ROWS[0], key) for key in ("recall", "bytes", "pattern", "digits")] == [
        "95.0%",
        "13k",
        "causal-self, grid",
        "",
    ]
    assert written(ROWS[3], "bytes") == "1.21M"


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["list", *arguments])
        return int(stopped.value.code or 0), "".join(capsys.readouterr())

    code, out = run("--where", "state=1 recall>.9", "--sort", "recall", "--json")
    found = json.loads(out)
    assert code == 0
    assert [one["name"] for one in found] == [
        one["name"] for one in sorted(found, key=lambda one: one["recall"], reverse=True)
    ]
    assert {one["state"] for one in found} == {"1"}
    assert "softmax" not in [one["name"] for one in found]
    for width in ("80", "140", "200"):
        monkeypatch.setenv("COLUMNS", width)
        code, out = run("--pattern", "causal-self")
        assert code == 0
        assert all(word in out for word in ("recall", "digits", "exponent", "bytes", "peer", "fastmax"))
    assert run("--where", "nothing=1")[0] == 2
    code, out = run("--where", "state=1", "--where", "recall>.9", "--sort", "recall", "--json")
    assert (code, json.loads(out)) == (0, found)


@pytest.mark.parametrize("width", [1, 40, 80, 140, 200, None])
def test_no_figure_of_the_table_is_cut(
    width: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.06k cut to 1.0... is another figure. None: into a pipe, where a line is a mechanism."""
    if width is not None:
        monkeypatch.setattr("manyheads.catalogue.command.console", lambda: Console(width=width))
    with pytest.raises(SystemExit):
        main(["list"])
    out = capsys.readouterr().out
    assert "\u2026" not in out
    if width is None:
        assert [line.split()[0] for line in out.splitlines()[3:]] == names()
        assert "arXiv:1706.03762" in out
    elif width >= 40:
        assert set(names()) <= set(out.split())
        assert max(map(len, out.splitlines())) <= width


def test_only_what_is_not_fresh_is_measured_again(figures: ModuleType) -> None:
    states = [
        ("recall", "abc", "fresh", ""),
        ("digits", "abc", "older", "code changed"),
        ("linear", "abc", "unknown", "its commit is not in this checkout"),
        ("peers", "abc", "older", "code changed"),
        ("real", "abc", "older", "ships in no figure"),
    ]
    ran: list[list[str]] = []
    said = importlib.import_module("refresh").refresh(states, ran.append)
    assert ran == [
        [sys.executable, "benchmarks/quality.py", "digits"],
        [sys.executable, "benchmarks/linear.py"],
    ]
    assert [line.split(":")[0] for line in said] == ["recall", "digits", "linear", "peers"]
    assert "an environment of its own" in said[-1]
