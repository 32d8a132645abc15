"""No more is claimed than was measured: ties are called ties, and noise has no exponent, wherever figures are told."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from manyheads.compare.cells import cells_of_experiment
from manyheads.compare.experiment import create_experiment
from manyheads.compare.report import write_report
from manyheads.compare.summary import summarise
from manyheads.compare.tables import headline, print_table, unbeaten
from manyheads.compare.train import build_model, error_of, evaluate, train_cell
from manyheads.runs import page
from manyheads.tasks import create_task

LENGTHS = (512, 1024, 2048, 4096)
ANSWERS = 2048


def quality(name: str, value: float, seed: int = 0, answers: int = ANSWERS) -> dict[str, Any]:
    """A cell of recall as the trainer leaves it."""
    error = error_of("accuracy", [(value * answers, answers)])
    cell = {"kind": "quality", "mechanism": name, "status": "done", "task": "recall", "n": 64, "seed": seed}
    cell |= {"learning_rate": 0.003, "best": True, "metric": "accuracy", "higher_is_better": True, "parameters": 1}
    return cell | {"value": value, "value_error": error, "answers": answers}


def timed(name: str, seconds: Any, turns: int = 3) -> list[dict[str, Any]]:
    """Speed cells whose forward pass took seconds(n, turn)."""
    same = {"kind": "speed", "mechanism": name, "status": "done", "causal": True, "method": "measured"}
    return [
        same | {"n": n, "turn": turn, "forward_s": seconds(n, turn)} for turn in range(1, turns + 1) for n in LENGTHS
    ]


def decoded(name: str, *seconds: float, state: int = 100) -> list[dict[str, Any]]:
    same = {"kind": "decode", "mechanism": name, "status": "done", "context": 4096, "state_bytes": state}
    return [same | {"turn": turn, "seconds_per_token": value} for turn, value in enumerate(seconds, start=1)]


def said(*cells: dict[str, Any]) -> str:
    return " ".join(headline({"schema": 1, "cells": list(cells)}))


# -- ties --------------------------------------------------------------------------------------------------------------


def test_a_difference_within_the_error_of_the_test_set_is_a_tie() -> None:
    line = said(quality("gqa", 0.993), quality("softmax", 0.992), quality("flow", 0.12))
    assert (
        "Tie at recall: gqa, softmax: accuracy 0.993 to 0.992 (higher is better), apart by no more than the error"
        in line
    )
    assert "of the test set (2,048 answers)." in line
    assert "Best at recall" not in line


def test_a_difference_beyond_it_is_none() -> None:
    assert "Best at recall: gqa, accuracy 0.993" in said(quality("gqa", 0.993), quality("softmax", 0.98))
    more = 1_000_000  # the same figures from more answers
    line = said(quality("gqa", 0.993, answers=more), quality("softmax", 0.992, answers=more))
    assert "Best at recall: gqa" in line


def test_all_right_is_not_certain() -> None:
    assert "Tie at recall: gqa, softmax" in said(quality("gqa", 1.0), quality("softmax", 0.9995))
    few = {"answers": 20}
    assert "Tie at recall: gqa, softmax" in said(quality("gqa", 1.0, **few), quality("softmax", 0.9, **few))


def test_seeds_that_scatter_make_a_tie() -> None:
    many = {"answers": 10_000_000}
    cells = [quality("a", v, seed, **many) for seed, v in enumerate((0.6, 0.8))]
    cells += [quality("b", v, seed, **many) for seed, v in enumerate((0.55, 0.75))]
    assert "Tie at recall: a, b: accuracy 0.700 to 0.650" in said(*cells)
    assert "apart by no more than the spread over seeds." in said(*cells)


def test_more_seeds_do_not_shrink_the_error_of_the_test_set() -> None:
    cells = [quality(name, v, seed) for name, v in (("a", 0.993), ("b", 0.992)) for seed in range(9)]
    assert "Tie at recall: a, b" in said(*cells)


def test_unbeaten_is_who_is_better_by_more_than_the_error() -> None:
    cells = [quality("small", 0.992), quality("large", 0.993), quality("tiny", 0.5)]
    cells += [
        cell for name, state in (("tiny", 1), ("small", 10), ("large", 99)) for cell in decoded(name, 1, state=state)
    ]
    assert unbeaten({"schema": 1, "cells": cells}, "recall") == ["tiny", "small"]


def test_the_error_of_an_accuracy_is_binomial() -> None:
    for right, asked in ((0, 10), (10, 10), (300, 400)):
        p = (right + 2) / (asked + 4)
        whole = error_of("accuracy", [(right, asked)])
        assert whole == pytest.approx(math.sqrt(p * (1 - p) / (asked + 4)))
        assert whole == error_of("accuracy", [(right, asked // 2), (0, asked - asked // 2)])
        assert whole > 0


def test_the_error_of_a_mean_is_that_over_examples() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    spread = torch.tensor(values).std() / 2
    assert error_of("bits_per_byte", [(10 * value, 10) for value in values]) == pytest.approx(float(spread))
    assert error_of("bits_per_byte", [(3.0, 5)]) is None


def test_the_trainer_counts_its_answers() -> None:
    task = create_task("recall", n=16, vocabulary=16, pairs=2, eval_examples=32)
    size = {"hidden_size": 16, "heads": 4, "layers": 1, "intermediate_size": 0, "short_conv": 3, "positions": "none"}
    score = evaluate(task, build_model(task, {"name": "softmax"}, size), torch.device("cpu"))
    assert score.answers == sum(int((batch.targets != -100).sum()) for batch in task.eval_batches(7)) > 32
    assert score.error == pytest.approx(error_of("accuracy", [(score.value * score.answers, score.answers)]))
    training = {"steps": 1, "seconds": None, "batch_size": 4, "eval_every": 1, "warmup": 0.1, "schedule": "cosine"}
    training |= {"weight_decay": 0.1, "clip": 1.0, "router_weight": 0.01, "stop_at": None}
    whole = {"mechanism": {"name": "softmax", "args": {}}, "device": "cpu", "precision": "float32", "model": size}
    whole |= {"task": {"name": "recall", "args": task.config}, "training": training, "seed": 0, "learning_rate": 1e-3}
    outcome = train_cell(whole)
    assert (outcome["answers"], outcome["value_error"] > 0) == (score.answers, True)


# -- times -------------------------------------------------------------------------------------------------------------


def test_the_fastest_is_named_only_where_timings_do_not_overlap() -> None:
    fast, slow = (0.010, 0.011, 0.012), (0.0119, 0.013, 0.014)
    cells = [*timed("a", lambda n, t: fast[t - 1] * n), *timed("b", lambda n, t: slow[t - 1] * n)]
    assert "Fastest causal forward pass at n = 4096: tie of a, b, 45.1 s to 53.2 s: their timings overlap." in said(
        *cells
    )
    apart = [*timed("a", lambda n, t: fast[t - 1] * n), *timed("c", lambda n, t: 9 * slow[t - 1] * n)]
    assert "Fastest causal forward pass at n = 4096: a, 45.1 s." in said(*apart)
    assert "tie of a, b" in said(*decoded("a", *fast), *decoded("b", *slow))
    assert "Fastest to decode at context 4096: a, 11 ms a token." in said(*decoded("a", *fast), *decoded("c", 1, 2, 3))


def test_one_turn_has_no_known_error() -> None:
    cells = [*timed("a", lambda n, t: n, turns=1), *timed("b", lambda n, t: 2 * n, turns=1)]
    assert "Not all were timed in several turns, so the error of this is unknown." in said(*cells)


def test_mechanisms_take_turns() -> None:
    """All of them once, then all of them again: nobody is timed alone in a bad minute."""
    speed = {"lengths": [8, 16], "turns": 2}
    changes = {"mechanisms": ["softmax", "gqa"], "sections": ["speed", "decode"], "speed": speed}
    built = create_experiment(changes | {"decode": {"contexts": [8], "turns": 2}})
    cells = cells_of_experiment(built)
    assert [(cell.mechanism, cell.place["n"], cell.place["turn"]) for cell in cells if cell.kind == "speed"] == [
        (name, n, turn) for turn in (1, 2) for name in ("softmax", "gqa") for n in (8, 16)
    ]  # fmt: skip
    assert [(cell.mechanism, cell.place["turn"]) for cell in cells if cell.kind == "decode"] == [
        ("softmax", 1), ("gqa", 1), ("softmax", 2), ("gqa", 2)
    ]  # fmt: skip
    assert len({cell.key for cell in cells}) == len(cells)
    assert len({cell.chain for cell in cells}) == 8
    fewer = create_experiment(changes | {"speed": speed | {"turns": 1}, "sections": ["speed"]})
    assert {cell.key for cell in cells_of_experiment(fewer)} < {cell.key for cell in cells}


def test_presets_time_in_turns() -> None:
    for name in ("quick", "standard", "full"):
        built = create_experiment({"preset": name})
        assert min(built.speed.turns, built.decode.turns) >= 3


# -- growth ------------------------------------------------------------------------------------------------------------

FALLING = timed("window", lambda n, turn: n**-0.28)
LINEAR = timed("linear", lambda n, turn: 1e-6 * n)
SQUARE = timed("square", lambda n, turn: 1e-9 * n**2)


def test_noise_has_no_exponent_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table, page, JSON and Answer of a window whose times fall with the length, as they did on a busy machine."""
    monkeypatch.setattr(page, "_libraries", lambda: "")
    results = {"schema": 1, "cells": [*FALLING, *LINEAR, *SQUARE]}
    out = io.StringIO()
    print_table(results, Console(file=out, width=100, color_system=None))
    written = write_report(results, tmp_path / "report.html").read_text()
    rows = {row["mechanism"]: row for row in summarise(results)}
    for text in (out.getvalue(), written, json.dumps(list(rows.values())), " ".join(headline(results))):
        assert "too noisy" in text.lower()
        assert "-0.2" not in text
        assert "n^-" not in text
    assert rows["window"]["forward_exponent"] is rows["window"]["forward_interval"] is None
    assert "Slowest growth of causal time with length: linear, n^1.00 ±0.00." in headline(results)
    assert "Too noisy to tell how time grows with length: window." in headline(results)


def test_only_noise_has_no_slowest_growth() -> None:
    assert "Slowest growth" not in said(*FALLING)


def test_the_slowest_growth_stands_alone_or_is_a_tie() -> None:
    wobble = (1.0, 1.04, 0.97)
    near = [
        *timed("a", lambda n, t: n * wobble[(LENGTHS.index(n) + t) % 3]),
        *timed("b", lambda n, t: n**1.03 * wobble[(LENGTHS.index(n) + 2 * t) % 3]),
    ]
    line = said(*near, *SQUARE)
    assert "Least growth of causal time with length: tie of a, b, n^" in line
    assert "their intervals overlap." in line
    assert "Slowest growth" not in line
    assert "square" not in line.split("Least growth")[1]
