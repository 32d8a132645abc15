"""What the cells of a comparison say, one row per mechanism, and the files that hold them.

Nothing is measured here: results go in (the dict that `results.json` holds), figures come out. A failed cell gives
no figure and is counted; a figure that was not measured is None, never a guess.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from manyheads.compare.growth import fitted_growth
from manyheads.runs.files import write_atomically
from manyheads.runs.results import Cell, Results, cells_of, done, failures_of, mechanisms_of, number

REFERENCE = "softmax"

# Where each figure comes from, in the words that tables and the report use.
SOURCES = {
    "quality": "measured",
    "parameters": "counted",
    "forward_exponent": "fitted to measured times, 95% interval",
    "memory_exponent": "fitted to measured peaks, 95% interval",
    "decode_ms": "measured",
    "state_bytes": "counted",
    "crossover": "interpolated between measured times",
    "forward_flops": "counted",
}

# Columns that lead the CSV, in this order; whatever else cells carry follows by name.
COLUMNS = ("kind", "mechanism", "status", "error", "seconds", "task", "n", "causal", "context", "seed", "learning_rate",
           "turn", "best", "metric", "higher_is_better", "value", "value_error", "answers",
           "parameters", "steps", "forward_s", "forward_backward_s",
           "forward_flops", "method", "peak_bytes", "seconds_per_token", "state_bytes",
           "model_state_bytes")  # fmt: skip

MISSING = {
    "quality": "No quality cells: quality, learning curves and the chart of quality against state are left out.",
    "speed": "No speed cells: times, their growth, the crossover and FLOPs are left out.",
    "memory": "No memory cells: peak memory and its growth are left out.",
    "decode": "No decode cells: decode time, state bytes and the chart of quality against state are left out.",
}


def missing_sections(results: Results) -> list[str]:
    """A sentence for every kind of cell that the results do not hold."""
    kinds = {cell["kind"] for cell in cells_of(results)}
    return [line for kind, line in MISSING.items() if kind not in kinds]


def task_label(cell: Cell, cells: Iterable[Cell]) -> str:
    """The task's name, with the length where one task was run at several."""
    lengths = {other.get("n") for other in cells if other["kind"] == "quality" and other.get("task") == cell["task"]}
    return str(cell["task"]) if len(lengths) == 1 else f"{cell['task']}, n {cell.get('n')}"


def tasks_of(results: Results) -> dict[str, list[Cell]]:
    """Quality cells under their task's label."""
    quality = [cell for cell in cells_of(results) if cell["kind"] == "quality"]
    tasks: dict[str, list[Cell]] = {}
    for cell in quality:
        tasks.setdefault(task_label(cell, quality), []).append(cell)
    return tasks


def series(cells: Iterable[Cell], kind: str, x: str, y: str, causal: bool | None = None) -> dict[int, float]:
    """y over x, ascending: the median where several done cells share an x, and nothing where none is finite."""
    found: dict[int, list[float]] = {}
    for cell in cells:
        wanted = cell["kind"] == kind and done(cell) and causal in (None, cell.get("causal"))
        value = number(cell.get(y)) if wanted else None
        if value is not None and number(cell.get(x)) is not None:
            found.setdefault(cell[x], []).append(value)
    return {key: median(found[key]) for key in sorted(found)}


def points_of(cells: Iterable[Cell], kind: str, y: str, causal: bool | None) -> list[tuple[int, int, float]]:
    """(turn, n, y) of the done cells of one kind; a cell without a turn is of the first."""
    return [
        (cell.get("turn") or 1, cell["n"], value)
        for cell in cells
        if cell["kind"] == kind and done(cell) and cell.get("causal") == causal and number(cell.get("n")) is not None
        if (value := number(cell.get(y))) is not None
    ]


def extremes(cells: Iterable[Cell], kind: str, x: str, at: int | None, y: str, causal: Any) -> list[float] | None:
    """Least and most of y at one place over the turns; None where there was one turn, and its error is unknown."""
    found = [
        value for cell in cells
        if cell["kind"] == kind and done(cell) and cell.get(x) == at is not None and cell.get("causal") == causal
        if (value := number(cell.get(y))) is not None
    ]  # fmt: skip
    return [min(found), max(found)] if len(found) > 1 else None


def tied_by(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What the difference of two qualities does not exceed, in words; '' where it is one."""
    gap = abs(one["mean"] - other["mean"])
    errors = [found["error"] for found in (one, other)]
    if None not in errors and gap <= 2 * math.hypot(*errors):
        return "the error of the test set"
    return "the spread over seeds" if gap <= math.hypot(one["std"] or 0.0, other["std"] or 0.0) else ""


def crossover(times: Mapping[int, float], reference: Mapping[int, float]) -> tuple[float | None, str]:
    """The length at which `times` falls below `reference` for good, and a word on it.

    The gap between the logarithms is interpolated over log n; of several crossings the last counts. "faster below"
    means that the mechanism wins at short lengths and loses from there on.
    """
    shared = sorted(n for n in times.keys() & reference.keys() if n > 0 and times[n] > 0 and reference[n] > 0)
    gaps = [math.log(times[n] / reference[n]) for n in shared]
    if not gaps:
        return None, "not measured"
    if all(gap < 0 for gap in gaps):
        return None, "always"
    crossings = [i for i in range(len(gaps) - 1) if (gaps[i] < 0) != (gaps[i + 1] < 0)]
    if not crossings:
        return None, "never in range"
    i = crossings[-1]
    part = gaps[i] / (gaps[i] - gaps[i + 1])
    length = math.exp(math.log(shared[i]) + part * math.log(shared[i + 1] / shared[i]))
    word = "faster above" if gaps[-1] < 0 else "faster below"
    return length, word if len(crossings) == 1 else f"{word}, last of {len(crossings)} crossings"


def summarise(results: Results) -> list[dict[str, Any]]:
    """One row per mechanism; `SOURCES` says which figures were measured and which counted.

    Speed and memory are those of causal calls where the mechanism has any, else of noncausal ones (`causal`), and the
    crossover compares like with like. FLOPs are taken at the longest length that all mechanisms share, if there is one.
    """
    groups: dict[str, list[Cell]] = {name: [] for name in mechanisms_of(results)}
    for cell in cells_of(results):
        groups[cell["mechanism"]].append(cell)
    tasks = tasks_of(results)
    failed = failures_of(results)
    flops_n = _shared_length([series(group, "speed", "n", "forward_flops") for group in groups.values()])
    rows = []
    for name, group in groups.items():
        row: dict[str, Any] = {"mechanism": name, "cells": len(group)}
        kinds = [failure["kind"] for failure in failed if failure["mechanism"] == name]
        row |= {"failures": len(kinds), "failed_kinds": sorted(set(kinds))}
        row["quality"] = {
            task: _quality([cell for cell in cells if cell["mechanism"] == name]) for task, cells in tasks.items()
        }
        row["parameters"] = next((q["parameters"] for q in row["quality"].values() if q["parameters"]), None)
        row |= _speed(name, group, groups.get(REFERENCE, [])) | _decode(group)
        counted = series(group, "speed", "n", "forward_flops", row["causal"])
        row["flops_n"] = flops_n if flops_n in counted else max(counted, default=None)
        row["forward_flops"] = counted.get(row["flops_n"])
        rows.append(row)
    return rows


def _shared_length(tables: Sequence[Mapping[int, float]]) -> int | None:
    counted = [set(table) for table in tables if table]
    return max(set.intersection(*counted), default=None) if counted else None


def _quality(cells: Sequence[Cell]) -> dict[str, Any]:
    """Mean and sample deviation over the seeds that finished at the selected rate, and how many should have."""
    chosen = [cell for cell in cells if cell.get("best")]
    rates = {cell.get("learning_rate") for cell in chosen}
    values = [value for cell in chosen if done(cell) and (value := number(cell.get("value"))) is not None]
    first = next(iter([*chosen, *cells]), {})
    return {
        "metric": first.get("metric"),
        "higher_is_better": first.get("higher_is_better", True),
        "mean": mean(values) if values else None,
        "std": stdev(values) if len(values) > 1 else None,
        "error": _test_error(chosen),
        "answers": next((cell["answers"] for cell in chosen if cell.get("answers")), None),
        "seeds": len(values),
        "planned": len({cell.get("seed") for cell in cells if not rates or cell.get("learning_rate") in rates}),
        "learning_rate": chosen[0].get("learning_rate") if chosen else None,
        "parameters": next((cell["parameters"] for cell in [*chosen, *cells] if cell.get("parameters")), None),
        "model_state_bytes": _model_state(chosen),
        "beyond": _beyond(chosen),
    }


def _beyond(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """For each multiple of the trained length that was asked for, the mean over the seeds that have a score there, with
    the sample deviation, or why none has."""
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for point in (point for cell in cells if done(cell) for point in cell.get("beyond") or ()):
        found.setdefault((point["times"], point["n"]), []).append(point)
    rows = []
    for (times, n), points in sorted(found.items()):
        values = [value for point in points if (value := number(point["value"])) is not None]
        spread = {"mean": mean(values) if values else None, "std": stdev(values) if len(values) > 1 else None}
        error = next((point["error"] for point in points if point["error"]), None)
        rows.append({"times": times, "n": n, **spread, "seeds": len(values), "error": error})
    return rows


def _model_state(cells: Iterable[Cell]) -> float | None:
    """Over the seeds, as what is kept may depend on what was learnt."""
    held = [value for cell in cells if done(cell) and (value := number(cell.get("model_state_bytes"))) is not None]
    return median(held) if held else None


def _test_error(cells: Iterable[Cell]) -> float | None:
    """Of the mean over seeds: all of them answered the same questions, so that more seeds do not make it less."""
    errors = [number(cell.get("value_error")) for cell in cells if done(cell)]
    known = [error for error in errors if error is not None]
    return mean(known) if known and len(known) == len(errors) else None


def _speed(name: str, group: Sequence[Cell], reference: Sequence[Cell]) -> dict[str, Any]:
    flags = [cell.get("causal") for cell in group if cell["kind"] in ("speed", "memory") and done(cell)]
    causal = True if True in flags else next(iter(flags), None)
    forward = series(group, "speed", "n", "forward_s", causal)
    peak = series(group, "memory", "n", "peak_bytes", causal)
    growth = fitted_growth(points_of(group, "speed", "forward_s", causal))
    memory = fitted_growth(points_of(group, "memory", "peak_bytes", causal))
    length, word = crossover(forward, series(reference, "speed", "n", "forward_s", causal))
    longest, memory_longest = max(forward, default=None), max(peak, default=None)
    return {
        "causal": causal,
        "speed_n": longest,
        "forward_s": forward[longest] if longest is not None else None,
        "forward_between": extremes(group, "speed", "n", longest, "forward_s", causal),
        "forward_exponent": growth.exponent,
        "forward_interval": growth.interval,
        "forward_range": growth.span,
        "forward_growth": growth.note,
        "memory_n": memory_longest,
        "peak_bytes": peak[memory_longest] if memory_longest is not None else None,
        "memory_exponent": memory.exponent,
        "memory_interval": memory.interval,
        "memory_range": memory.span,
        "memory_growth": memory.note,
        "crossover": None if name == REFERENCE else length,
        "crossover_note": "reference" if name == REFERENCE and forward else word,
        "speed_method": "/".join(sorted({str(c.get("method", "measured")) for c in group if c["kind"] == "speed"})),
    }


def _decode(group: Sequence[Cell]) -> dict[str, Any]:
    seconds = series(group, "decode", "context", "seconds_per_token")
    state = series(group, "decode", "context", "state_bytes")
    row: dict[str, Any] = {"decode_context": None, "decode_from": None, "decode_ms": None, "state_bytes": None}
    row |= {"decode_ratio": None, "state_ratio": None, "decode_between": None}
    contexts = sorted(seconds.keys() | state.keys())
    if not contexts:
        return row
    low, high = contexts[0], contexts[-1]
    row |= {"decode_context": high, "decode_from": low, "state_bytes": state.get(high)}
    row["decode_ms"] = seconds[high] * 1e3 if high in seconds else None
    between = extremes(group, "decode", "context", high, "seconds_per_token", None)
    row["decode_between"] = between and [1e3 * seconds for seconds in between]
    row["decode_ratio"] = _ratio(seconds.get(high), seconds.get(low))
    row["state_ratio"] = _ratio(state.get(high), state.get(low))
    return row


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def pareto(
    rows: Iterable[Mapping[str, Any]], x: str, y: str, *, lower_x: bool = True, higher_y: bool = True
) -> list[dict[str, Any]]:
    """The rows, `pareto` True where no other row is as good in x and in y and better in one; equal rows share it."""

    def signed(row: Mapping[str, Any]) -> tuple[float, float] | None:
        across, up = number(row.get(x)), number(row.get(y))
        if across is None or up is None:
            return None
        return (across if lower_x else -across), (-up if higher_y else up)

    costs = [(row, signed(row)) for row in rows]
    known = [cost for _, cost in costs if cost is not None]

    def beaten(cost: tuple[float, float]) -> bool:
        return any(other[0] <= cost[0] and other[1] <= cost[1] and other != cost for other in known)

    return [{**row, "pareto": cost is not None and not beaten(cost)} for row, cost in costs]


def quality_against_state(results: Results, task: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Points for one task, the front marked, all at the longest context decoded; and who could not be placed."""
    rows = summarise(results)
    context = max((row["decode_context"] for row in rows if row["decode_context"] is not None), default=None)
    points, left_out = [], []
    for row in rows:
        quality = row["quality"][task]
        at_context = row["decode_context"] == context and row["state_bytes"] is not None
        if context is None or quality["mean"] is None or not at_context:
            left_out.append(row["mechanism"])
            continue
        kept = {key: quality[key] for key in ("mean", "std", "error", "metric", "higher_is_better")}
        points.append({"mechanism": row["mechanism"], "state_bytes": row["state_bytes"], "context": context, **kept})
    higher = all(point["higher_is_better"] for point in points)
    return pareto(points, "state_bytes", "mean", higher_y=higher), left_out


def write_csv(results: Results, path: str | Path) -> list[Path]:
    """One line per cell, failed ones too; learning curves go to `learning_curves.csv` beside it, if there are any."""
    path = Path(path)
    cells = cells_of(results)
    extra = sorted({key for cell in cells for key in cell} - {*COLUMNS, "curve"})
    written = [write_atomically(path, _csv_text([*COLUMNS, *extra], cells))]
    keys = ("mechanism", "task", "n", "seed", "learning_rate", "best")
    steps = [{key: cell.get(key) for key in keys} | dict(point) for cell in cells for point in cell.get("curve") or ()]
    if steps:
        target = path.with_name("learning_curves.csv")
        written.append(write_atomically(target, _csv_text([*keys, "step", "loss", "value"], steps)))
    return written


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else value


def _csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_plain(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()
