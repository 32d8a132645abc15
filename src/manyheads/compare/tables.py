"""A comparison in tables: what each place says and sorts by, the answer in words, and all of it for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from manyheads.compare.summary import SOURCES, missing_sections, quality_against_state, summarise, tasks_of
from manyheads.runs.results import Results, cells_of, failures_of, number
from manyheads.runs.tables import Column, Entry, bytes_text, count_text, failure_lines, rich_table, seconds_text

if TYPE_CHECKING:
    from rich.console import Console


def headline(results: Results) -> list[str]:
    """The answer in sentences: who was best at each task, who needs least, who is fastest, what failed."""
    rows = summarise(results)
    if not rows:
        return ["No cells were run, so there is no answer yet."]
    lines = [line for task in tasks_of(results) if (line := _best_line(rows, results, task))]
    context = max((row["decode_context"] for row in rows if row["decode_context"] is not None), default=None)
    decoded = [row for row in rows if row["decode_context"] == context is not None]
    lines += _least(decoded, "state_bytes", f"Smallest state at context {context}", bytes_text)
    lines += _least(decoded, "decode_ms", f"Fastest to decode at context {context}", lambda ms: f"{ms:.3g} ms a token")
    longest = max((row["speed_n"] for row in rows if row["speed_n"] is not None), default=None)
    alike = [row for row in rows if row["causal"] == any(row["causal"] for row in rows)]
    sort = "causal" if any(row["causal"] for row in rows) else "noncausal"
    timed = [row for row in alike if row["speed_n"] == longest is not None]
    lines += _least(timed, "forward_s", f"Fastest {sort} forward pass at n = {longest}", seconds_text)
    lines += _least(alike, "forward_exponent", f"Slowest growth of {sort} time with length", lambda p: f"n^{p:.2f}")
    return lines + _counted_failures(results)


def _counted_failures(results: Results) -> list[str]:
    """How many cells failed and how many ask for what a mechanism does not declare: two different things."""
    lines, failures = [], failures_of(results)
    for words, kind in (("failed", False), ("ask for what is not declared", True)):
        found = [failure for failure in failures if (failure["status"] == "undeclared") == kind]
        if found:
            who = ", ".join(dict.fromkeys(failure["mechanism"] for failure in found))
            lines.append(f"{len(found)} of {len(cells_of(results))} cells {words} ({who}): see the failures.")
    return lines


def _best_line(rows: Sequence[Mapping[str, Any]], results: Results, task: str) -> str:
    ranked = [(row["mechanism"], row["quality"][task]) for row in rows if row["quality"][task]["mean"] is not None]
    if not ranked:
        return f"No mechanism finished {task}."
    higher = ranked[0][1]["higher_is_better"]
    ranked.sort(key=lambda pair: pair[1]["mean"], reverse=higher)
    name, best = ranked[0]
    metric = str(best["metric"]).replace("_", " ")
    line = f"Best at {task}: {name}, {metric} {_spread(best)} ({'higher' if higher else 'lower'} is better)."
    if best["seeds"] < 2:
        return line + " One seed, so its spread is unknown."
    close = [
        other for other, found in ranked[1:]
        if abs(found["mean"] - best["mean"]) <= math.hypot(best["std"] or 0.0, found["std"] or 0.0)
    ]  # fmt: skip
    if close:
        line += f" Within the spread over seeds: {', '.join(close)}."
    points = sorted(quality_against_state(results, task)[0], key=lambda point: point["state_bytes"])
    front = [point["mechanism"] for point in points if point["pareto"]]
    return line + (f" Unbeaten at their state size, smallest first: {', '.join(front)}." if len(front) > 1 else "")


def _least(rows: Sequence[Mapping[str, Any]], key: str, words: str, text: Any) -> list[str]:
    known = [row for row in rows if row[key] is not None]
    if not known:
        return []
    least = min(row[key] for row in known)
    names = [row["mechanism"] for row in known if row[key] == least]
    return [f"{words}: {', '.join(names)}, {text(least)}."]


def _spread(quality: Mapping[str, Any]) -> str:
    deviation = f" ± {quality['std']:.3f}" if quality["std"] is not None else ""
    return f"{quality['mean']:.3f}{deviation}"


def summary_table(results: Results) -> tuple[list[Column], list[list[Entry]]]:
    """Columns for which some mechanism has a figure or a failure, and a line of entries per mechanism."""
    rows = summarise(results)
    kinds = {cell["kind"] for cell in cells_of(results)}
    made: list[tuple[Column, list[Entry]]] = []
    for task in tasks_of(results):
        first: Mapping[str, Any] = next((row["quality"][task] for row in rows if row["quality"][task]["metric"]), {})
        metric = str(first.get("metric", "quality")).replace("_", " ")
        higher = bool(first.get("higher_is_better", True))
        note = f"{metric}, {'higher' if higher else 'lower'} is better; {SOURCES['quality']}"
        made.append(_hoist(Column(task, note, down=higher), [_quality_entry(row, task) for row in rows]))
    if "quality" in kinds:
        made.append(_column(rows, "Parameters", "parameters", "quality", count_text))
    if "speed" in kinds:
        made += _speed_columns(rows)
    if "memory" in kinds:
        made.append(_column(rows, "Memory growth", "memory_exponent", "memory", _power, _range("memory_range")))
    if "decode" in kinds:
        made += _decode_columns(rows)
    made.append((Column("Failed", "cells", down=True), [_failed_entry(row) for row in rows]))
    names = [Entry(row["mechanism"], row["mechanism"]) for row in rows]
    columns = [Column("Mechanism", number=False), *(column for column, _ in made)]
    return columns, [list(line) for line in zip(names, *(entries for _, entries in made), strict=True)]


def _column(
    rows: Sequence[Mapping[str, Any]], title: str, key: str, kind: str, text: Any, notes: Any = lambda row: ()
) -> tuple[Column, list[Entry]]:
    entries = []
    for row in rows:
        if row[key] is not None:
            entries.append(Entry(text(row[key]), row[key], notes(row)))
        else:
            failed = kind in row["failed_kinds"]
            entries.append(Entry("failed" if failed else "–", bad=failed))
    return _hoist(Column(title, SOURCES[key], brief=title.removesuffix(" growth").replace("eter", "")), entries)


def _hoist(column: Column, entries: Sequence[Entry]) -> tuple[Column, list[Entry]]:
    """Notes that all entries share move to the column's title, so that each row says only what is its own."""
    noted = [entry.notes for entry in entries if entry.notes]
    shared = [note for note in noted[0] if all(note in notes for notes in noted)] if noted else []
    kept = [replace(entry, notes=tuple(n for n in entry.notes if n not in shared)) for entry in entries]
    return replace(column, note="; ".join([part for part in (column.note, *shared) if part])), kept


def _power(exponent: float) -> str:
    return f"n^{exponent:.2f}"


def _range(key: str) -> Any:
    def notes(row: Mapping[str, Any]) -> tuple[str, ...]:
        low, high = row[key]
        return (f"n {low:,}–{high:,}", *(["noncausal"] if row["causal"] is False else []))

    return notes


def _quality_entry(row: Mapping[str, Any], task: str) -> Entry:
    found = row["quality"][task]
    if found["mean"] is None:
        return Entry("failed" if found["planned"] else "–", bad=bool(found["planned"]))
    seeds, planned, rate = found["seeds"], found["planned"], found["learning_rate"]
    words = f"{seeds} of {planned} seeds" if seeds < planned else f"{seeds} seed{'s' * (seeds != 1)}"
    notes = (words, f"lr {rate:g}") if number(rate) is not None else (words,)
    return Entry(_spread(found), found["mean"], notes, bad=seeds < planned)


def _speed_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Column, list[Entry]]]:
    def crossing(row: Mapping[str, Any]) -> Entry:
        if row["crossover"] is None:
            ranks = {"always": 0.0, "never in range": math.inf}
            return Entry(row["crossover_note"], ranks.get(row["crossover_note"]))  # the rest sorts last
        return Entry(f"n ≈ {row['crossover']:,.0f}", row["crossover"], tuple(row["crossover_note"].split(", ")))

    growth = _column(rows, "Time growth", "forward_exponent", "speed", _power, _range("forward_range"))
    methods = {row["speed_method"] for row in rows if row["speed_method"]}
    if methods - {"measured"}:
        note = growth[0].note.replace("measured times", f"times: {', '.join(sorted(methods))}")
        growth = replace(growth[0], note=note), growth[1]
    flops = _column(rows, "FLOPs", "forward_flops", "speed", count_text, lambda row: (f"at n {row['flops_n']:,}",))
    crossed = Column("Faster than softmax", SOURCES["crossover"], brief="Beats softmax")
    return [growth, (crossed, [crossing(row) for row in rows]), flops]


def _decode_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Column, list[Entry]]]:
    def growth(key: str) -> Any:
        def notes(row: Mapping[str, Any]) -> tuple[str, ...]:
            low, high = row["decode_from"], row["decode_context"]
            since = (f"× is against context {low:,}", f"×{row[key]:.3g}") if row[key] is not None and low < high else ()
            return (f"at context {high:,}", *since)

        return notes

    time = _column(rows, "Decode", "decode_ms", "decode", lambda ms: f"{ms:.3g} ms", growth("decode_ratio"))
    state = _column(rows, "State", "state_bytes", "decode", bytes_text, growth("state_ratio"))
    return [time, state]


def _failed_entry(row: Mapping[str, Any]) -> Entry:
    text = f"{row['failures']} of {row['cells']}"
    return Entry(text, row["failures"], tuple(row["failed_kinds"]), bool(row["failures"]))


def print_table(results: Results, console: Console) -> None:
    """A summary that fits 100 columns: quality in one table, costs in another, then failures and what is missing."""
    from rich.text import Text

    columns, lines = summary_table(results)
    tasks = len(tasks_of(results))
    if lines:
        if tasks:
            console.print(rich_table(columns[: tasks + 1], lines, range(tasks + 1)))
        console.print(rich_table(columns, lines, [0, *range(tasks + 1, len(columns))]))
    for sentence in [*headline(results), *missing_sections(results)]:
        console.print(Text(sentence))
    for line in _undeclared_lines(results):
        console.print(Text(line, style="dim"))
    for line in failure_lines(results):
        console.print(Text(line, style="red"), no_wrap=True, overflow="ellipsis")


def _undeclared_lines(results: Results) -> list[str]:
    """One line for all mechanisms that do not declare what a task, or a measurement, needs."""
    groups: dict[str, dict[str, None]] = {}
    for failure in failures_of(results):
        if failure["status"] == "undeclared":
            groups.setdefault(failure.get("task") or failure["kind"], {})[failure["mechanism"]] = None
    return [f"not declared, {what}: {', '.join(names)}" for what, names in groups.items()]
