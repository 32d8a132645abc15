"""benchmarks/convert.py: claims as the rows say, a run that goes on row by row, and what the page shows of it."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from manyheads.hosts.loading import Loaded, load_model

ROOT = Path(__file__).parent.parent.parent


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, found)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model()


def line(conversion: str, seed: int, kl: float, **more: Any) -> dict[str, Any]:
    figures = {"cache": 8, "parameters": 9, "bits_per_token": 1 + kl, "passkeys": 0.5, "keys": 2}
    return {"conversion": conversion, "seed": seed, "kl_bits": kl, **figures, **more}


def test_a_claim_shows_where_every_seed_has_its_order(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    convert = module("convert", monkeypatch)
    names = ("procrustes", "mean", "first", "random")
    of_seeds = {0: (0.1, 0.2, 0.3, 0.4), 1: (0.1, 0.3, 0.2, 0.4)}
    lines = [
        line(f"gqa 2, {n}", seed, kl) for seed, each in of_seeds.items() for n, kl in zip(names, each, strict=True)
    ]
    claim = "aligned < mean < first < random heads, 2 left"
    told = {row["claim"]: row for row in convert.judged(loaded, lines)}
    assert list(told) == [claim]
    assert not told[claim]["shows"]
    assert told[claim]["of_seeds"] == [list(each) for each in of_seeds.values()]
    # A seed that is not whole yet says nothing; healed rows are judged by bits.
    lines = [row for row in lines if (row["conversion"], row["seed"]) != ("gqa 2, first", 1)]
    lines += [line(f"gqa 2, {n}, healed", 0, kl) for n, kl in zip(names, (0.1, 0.2, 0.3, 0.25), strict=True)]
    told = {row["claim"]: row for row in convert.judged(loaded, lines)}
    assert told[claim]["shows"]
    assert told[claim]["of_seeds"] == [[0.1, 0.2, 0.3, 0.4]]
    assert told[f"{claim}, healed"]["of_seeds"] == [[1.1, 1.2, 1.3, 1.25]]
    assert not told[f"{claim}, healed"]["shows"]


def test_papers_orders_are_all_among_what_is_run(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    convert = module("convert", monkeypatch)
    run = {one.title for one in convert.conversions(loaded, 2)}
    run |= {f"{one.title}, taught" for one in convert.conversions(loaded, 2) if one.method.lesson is not None}
    wanted = {title for _, titles in convert.claims(loaded) for title in titles}
    assert wanted <= run
    monkeypatch.setattr(convert, "MANY", 1)
    large = convert.conversions(loaded, 2)
    assert {one.title.split(",")[0] for one in large} == {"gqa 2", "mla 95", "hedgehog in 4 layers"}


def test_rows_are_kept_as_they_come_and_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, loaded: Loaded, tmp_path: Path
) -> None:
    convert = module("convert", monkeypatch)
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(convert, "RESULTS", tmp_path)
    made: list[tuple[str, int]] = []

    class Cheap:
        def __init__(self, loaded: Loaded, number: int, setting: Any) -> None:
            self.rows, self.learnt = [], None

        def figures(self, model: Any) -> dict[str, Any]:
            figures = line("", 0, 0.5)
            return {key: figures[key] for key in figures if key not in ("conversion", "seed")}

    class Stopped(convert.Bench):  # type: ignore[misc, name-defined]
        most = 3

        def make(self, asked: Any) -> Any:
            if len(made) == self.most:
                raise KeyboardInterrupt
            made.append((asked.title, self.number))
            return self.loaded.model

    monkeypatch.setattr(convert, "Seed", Cheap)
    given = argparse.Namespace(model=None, heal=0, healed_seeds=1, only=None, dry=False, minutes=0.0)
    setting = convert.replace(convert.SMALL, seeds=2)
    todo = [one for one in convert.conversions(loaded, 2) if one.title in ("gqa 2, mean", "gqa 2, first")]
    with pytest.raises(KeyboardInterrupt):
        Stopped(loaded, given, setting).run(todo)
    rows = json.loads((tmp_path / "convert.json").read_text())["rows"]
    assert [(row["conversion"], row["seed"]) for row in rows] == [
        ("none", 0), ("gqa 2, mean", 0), ("gqa 2, first", 0), ("none", 1), ("gqa 2, mean", 1)
    ]  # fmt: skip
    Stopped.most = 9
    assert Stopped(loaded, given, setting).run(todo)
    assert made == [("gqa 2, mean", 0), ("gqa 2, first", 0), ("gqa 2, mean", 1), ("gqa 2, first", 1)]
    # No row begins when the minutes are over, and what is there stays.
    given.minutes, given.heal = 1e-9, 100
    late = Stopped(loaded, given, setting)
    assert not late.run(todo)
    assert len(late.lines) == 6
    assert len(made) == 4


def test_the_page_shows_means_healing_and_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    page = module("page", monkeypatch)
    rows = [
        {"model": "m", **line("gqa 2, mean", 0, 0.25)},
        {"model": "m", **line("gqa 2, mean", 1, 0.75)},
        {"model": "m", **line("gqa 2, mean, healed", 0, 0.125, healed=1024)},
        {"model": "m", "claim": "a < b", "shows": False, "of_seeds": [[0.5, 0.25]]},
    ]
    told = page._convert(rows)
    assert told[2] == "| m | gqa 2, mean | 8 | 2 | 1.500 | 0.500 | 50% | 1.125 | 50% | 1,024, 1 |"
    assert told[-1] == "- m, a < b: does not show (0.500 < 0.250)"
