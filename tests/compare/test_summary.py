"""The figures that a summary derives, against exact laws, lines drawn by hand and brute force."""

from __future__ import annotations

import csv
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from manyheads.compare.growth import TOO_FEW, TOO_NOISY, WIDEST, Growth, fitted_growth
from manyheads.compare.summary import (
    crossover,
    missing_sections,
    pareto,
    quality_against_state,
    summarise,
    tasks_of,
    write_csv,
)
from manyheads.runs.files import write_atomically
from manyheads.runs.results import failures_of, write_json


def results_of(*cells: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "manyheads": "0.1.0",
        "created": "2030-01-01T00:00:00",
        "environment": {},
        "cells": list(cells),
    }


def quality(mechanism: str, value: float | None, **other: Any) -> dict[str, Any]:
    cell = {"kind": "quality", "mechanism": mechanism, "status": "done", "error": None, "task": "recall", "n": 64}
    cell |= {"seed": 0, "learning_rate": 0.003, "best": True, "metric": "accuracy", "higher_is_better": True}
    return cell | {"value": value, "parameters": 1000} | other


def speed(mechanism: str, n: int, seconds: float, **other: Any) -> dict[str, Any]:
    cell = {"kind": "speed", "mechanism": mechanism, "status": "done", "n": n, "causal": True, "forward_s": seconds}
    return cell | {"forward_backward_s": 3 * seconds, "forward_flops": 10 * n, "method": "measured"} | other


def decode(mechanism: str, context: int, seconds: float, state: int) -> dict[str, Any]:
    cell = {"kind": "decode", "mechanism": mechanism, "status": "done", "context": context}
    return cell | {"seconds_per_token": seconds, "state_bytes": state}


def row_of(results: dict[str, Any], mechanism: str) -> dict[str, Any]:
    return next(row for row in summarise(results) if row["mechanism"] == mechanism)


def one_turn(points: dict[int, float], turn: int = 1) -> list[tuple[int, int, float]]:
    return [(turn, n, y) for n, y in points.items()]


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_exponent_of_an_exact_power_law(power: float) -> None:
    found = fitted_growth(one_turn({n: 3e-7 * n**power for n in (64, 128, 300, 1024, 5000)}))
    assert found.exponent == pytest.approx(power, abs=1e-9)
    assert found.interval == (pytest.approx(power, abs=1e-6), pytest.approx(power, abs=1e-6))
    assert (found.span, found.note) == ((300, 5000), "")


def test_exponent_comes_from_the_upper_half_or_from_three_lengths() -> None:
    law = dict.fromkeys((2, 4, 8), 5.0) | {n: n**2.0 for n in (16, 32, 64)}
    assert fitted_growth(one_turn(law)).span == (16, 64)
    assert fitted_growth(one_turn({8: 5.0, 16: 1.0, 32: 2.0, 64: 4.0})).span == (16, 64)
    assert fitted_growth(one_turn({8: 1.0, 16: 1.0, 32: 4.0})).span == (8, 32)


def test_the_interval_is_that_of_least_squares_within_turns() -> None:
    """Two turns at two levels, by hand: in base-2 logarithms y is 0, 1.1, 2 and 5, 6, 7.1 at x = 3, 4, 5."""
    turns = [[0.0, 1.1, 2.0], [5.0, 6.0, 7.1]]
    points = [(turn, 2**x, 2.0**y) for turn, ys in enumerate(turns) for x, y in zip((3, 4, 5), ys, strict=True)]
    found = fitted_growth(points)
    slope = (2.0 + 2.1) / 4
    rest = sum((y - sum(ys) / 3 - slope * (x - 4)) ** 2 for ys in turns for x, y in zip((3, 4, 5), ys, strict=True))
    half = 4.303 * math.sqrt(rest / 3 / 4) * (3.182 / 4.303)  # six points, two levels and a slope: three are free
    assert found.exponent == pytest.approx(slope)
    assert found.interval == (pytest.approx(slope - half), pytest.approx(slope + half))


def test_what_slows_a_whole_turn_is_no_growth() -> None:
    """Lengths timed at different hours would have told anything; within turns the law is seen."""
    points = [(turn, n, level * 1e-6 * n) for turn, level in enumerate((1.0, 7.0, 0.3)) for n in (512, 1024, 2048)]
    assert fitted_growth(points).exponent == pytest.approx(1.0)


def test_no_exponent_that_the_points_do_not_support() -> None:
    falling = [(turn, n, n**-0.28) for turn in range(3) for n in (512, 1024, 2048)]
    assert fitted_growth(falling) == Growth(span=(512, 2048), note=TOO_NOISY)
    rng = random.Random(0)
    noisy = [(turn, n, n * math.exp(rng.gauss(0, 0.5))) for turn in range(3) for n in (512, 1024, 2048)]
    assert fitted_growth(noisy) == Growth(span=(512, 2048), note=TOO_NOISY)
    rng = random.Random(0)
    quiet = fitted_growth([(t, n, n * math.exp(rng.gauss(0, 0.05))) for t in range(3) for n in (512, 1024, 2048)])
    assert quiet.interval is not None
    assert quiet.interval[0] < 1.0 < quiet.interval[1] < quiet.interval[0] + WIDEST


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, held = random.Random(1), 0
    for _ in range(1000):
        points = [(t, n, n * math.exp(rng.gauss(t, 0.03))) for t in range(3) for n in (512, 1024, 2048)]
        interval = fitted_growth(points).interval
        assert interval is not None
        held += interval[0] <= 1.0 <= interval[1]
    assert 930 <= held <= 970


@pytest.mark.parametrize("points", [{64: 1.0}, {64: 0.0, 128: 1.0}, {64: 1.0, 128: 2.0}])
def test_too_few_points_give_no_exponent(points: dict[int, float]) -> None:
    assert fitted_growth(one_turn(points)) == Growth(note=TOO_FEW)
    assert fitted_growth([]) == Growth()


def test_crossover_of_two_known_lines() -> None:
    lengths = (64, 256, 1024, 4096)
    square, straight = {n: 1e-6 * n**2 for n in lengths}, {n: 5e-4 * n for n in lengths}
    assert crossover(straight, square) == (pytest.approx(500.0), "faster above")
    assert crossover(square, straight) == (pytest.approx(500.0), "faster below")


def test_crossover_that_does_not_happen() -> None:
    slow, fast = {8: 4.0, 16: 9.0}, {8: 3.0, 16: 5.0}
    assert crossover(slow, fast) == (None, "never in range")
    assert crossover(fast, slow) == (None, "always")
    assert crossover(fast, fast) == (None, "never in range")
    assert crossover(fast, {32: 1.0}) == (None, "not measured")


def test_of_several_crossings_the_last_counts() -> None:
    reference = dict.fromkeys((1, 4, 16, 64), 1.0)
    length, word = crossover({1: 2.0, 4: 0.5, 16: 2.0, 64: 0.5}, reference)
    assert length == pytest.approx(32.0)
    assert word == "faster above, last of 3 crossings"


def test_pareto_against_brute_force() -> None:
    rng = random.Random(0)
    for lower_x in (True, False):
        for higher_y in (True, False):
            rows = [{"x": rng.randint(0, 6), "y": rng.randint(0, 6)} for _ in range(25)] + [{"x": None, "y": 9}]
            found = pareto(rows, "x", "y", lower_x=lower_x, higher_y=higher_y)
            for row in found[:-1]:
                beaten = False
                for other in found[:-1]:
                    x_no_worse = other["x"] <= row["x"] if lower_x else other["x"] >= row["x"]
                    y_no_worse = other["y"] >= row["y"] if higher_y else other["y"] <= row["y"]
                    differs = other["x"] != row["x"] or other["y"] != row["y"]
                    beaten = beaten or (x_no_worse and y_no_worse and differs)
                assert row["pareto"] is not beaten
            assert found[-1]["pareto"] is False


def test_quality_is_the_mean_over_seeds_at_the_selected_rate() -> None:
    cells = [quality("a", value, seed=seed) for seed, value in enumerate((0.5, 0.7, 0.9))]
    cells += [quality("a", 0.1, seed=seed, learning_rate=0.1, best=False) for seed in range(3)]
    found = row_of(results_of(*cells), "a")["quality"]["recall"]
    assert found["mean"] == pytest.approx(0.7)
    assert found["std"] == pytest.approx(0.2)
    assert (found["seeds"], found["planned"], found["learning_rate"]) == (3, 3, 0.003)


def test_a_failed_seed_is_counted_and_not_averaged() -> None:
    results = results_of(
        quality("a", 0.5), quality("a", None, seed=1, status="failed", error="killed"), quality("a", math.nan, seed=2)
    )
    row = row_of(results, "a")
    assert row["quality"]["recall"]["mean"] == 0.5
    assert (row["quality"]["recall"]["seeds"], row["quality"]["recall"]["planned"], row["failures"]) == (1, 3, 2)
    assert [failure["error"] for failure in failures_of(results)] == ["killed", "the run ended with accuracy = nan"]


def test_a_task_at_two_lengths_makes_two_columns() -> None:
    results = results_of(quality("a", 0.5), quality("a", 0.4, n=128), quality("a", 2.0, task="text"))
    assert list(tasks_of(results)) == ["recall, n 64", "recall, n 128", "text"]


def test_costs_of_one_mechanism() -> None:
    cells = [speed("softmax", n, 1e-6 * n**2) for n in (64, 256, 1024, 4096)]
    cells += [speed("fast", n, 5e-4 * n) for n in (64, 256, 1024, 4096)]
    cells += [
        {"kind": "memory", "mechanism": "fast", "status": "done", "n": n, "causal": True, "peak_bytes": 7 * n}
        for n in (64, 256, 1024)
    ]
    cells += [decode("fast", 1024, 1e-3, 100), decode("fast", 4096, 2e-3, 400)]
    row = row_of(results_of(*cells), "fast")
    assert row["crossover"] == pytest.approx(500.0)
    assert row["forward_exponent"] == pytest.approx(1.0)
    assert row["memory_exponent"] == pytest.approx(1.0)
    assert (row["forward_range"], row["memory_range"]) == ((256, 4096), (64, 1024))
    assert (row["decode_context"], row["decode_ms"], row["state_bytes"]) == (4096, 2.0, 400)
    assert (row["decode_ratio"], row["state_ratio"]) == (2.0, 4.0)
    assert (row["flops_n"], row["forward_flops"]) == (4096, 40960)
    assert row_of(results_of(*cells), "softmax")["crossover_note"] == "reference"


def test_flops_are_compared_at_a_shared_length() -> None:
    cells = [speed("a", 64, 1.0), speed("a", 256, 1.0), speed("b", 64, 1.0)]
    cells += [speed("b", 256, 1.0, status="failed", error="out of memory")]
    assert [row["flops_n"] for row in summarise(results_of(*cells))] == [64, 64]


def test_causal_calls_are_compared_with_causal_calls() -> None:
    cells = [speed("softmax", n, 1.0, causal=causal) for n in (8, 16) for causal in (True, False)]
    cells += [speed("both", n, 2.0 if causal else 0.5, causal=causal) for n in (8, 16) for causal in (True, False)]
    cells += [speed("open", n, 0.5, causal=False) for n in (8, 16)]
    results = results_of(*cells)
    assert row_of(results, "both")["crossover_note"] == "never in range"
    assert row_of(results, "open")["crossover_note"] == "always"


def test_the_front_is_drawn_at_one_context() -> None:
    cells = [quality("a", 0.9), decode("a", 64, 1.0, 100), decode("a", 256, 1.0, 400)]
    cells += [quality("b", 0.8), decode("b", 64, 1.0, 10), decode("b", 256, 1.0, 10)]
    cells += [quality("c", 0.7), decode("c", 256, 1.0, 50)]
    cells += [quality("short", 0.99), decode("short", 64, 1.0, 1), decode("no-quality", 256, 1.0, 1)]
    points, left_out = quality_against_state(results_of(*cells), "recall")
    assert {point["mechanism"]: point["pareto"] for point in points} == {"a": True, "b": True, "c": False}
    assert left_out == ["short", "no-quality"]


def test_lower_is_better_turns_the_front() -> None:
    cells = [decode(name, 8, 1.0, state) for name, state in (("a", 1), ("b", 2))]
    cells += [quality(name, value, higher_is_better=False) for name, value in (("a", 1.2), ("b", 1.5))]
    points, _ = quality_against_state(results_of(*cells), "recall")
    assert [point["pareto"] for point in points] == [True, False]


def test_empty_results_and_missing_sections() -> None:
    assert summarise(results_of()) == []
    assert len(missing_sections(results_of())) == 4
    assert [line.split()[1] for line in missing_sections(results_of(quality("a", 0.5)))] == [
        "speed",
        "memory",
        "decode",
    ]


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schema 7.*reads schema 1"):
        summarise({"schema": 7, "cells": []})


def test_csv_has_a_line_per_cell_and_the_curves_beside_it(tmp_path: Path) -> None:
    curve = [{"step": 1, "loss": 2.5, "value": None}, {"step": 2, "loss": 1.5, "value": 0.25}]
    failed = quality("b", None, status="failed", error='said "no",\nthen stopped')
    results = results_of(quality("a", 0.5, curve=curve), failed, speed("a", 8, 0.25, extra={"deep": [1]}))
    written = write_csv(results, tmp_path / "results.csv")
    assert [path.name for path in written] == ["results.csv", "learning_curves.csv"]
    with written[0].open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["kind"] for line in lines] == ["quality", "quality", "speed"]
    assert "curve" not in lines[0]
    assert (lines[0]["value"], lines[1]["value"], lines[1]["error"]) == ("0.5", "", failed["error"])
    assert json.loads(lines[2]["extra"]) == {"deep": [1]}
    with written[1].open(newline="") as stream:
        assert [(line["mechanism"], line["loss"]) for line in csv.DictReader(stream)] == [("a", "2.5"), ("a", "1.5")]


def test_json_is_strict(tmp_path: Path) -> None:
    path = write_json(results_of(quality("a", math.nan)), tmp_path / "new" / "results.json")
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["cells"][0]["value"] is None
    assert found["cells"][0]["seed"] == 0


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "kept.txt", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device.*make room.*kept\.txt"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]
