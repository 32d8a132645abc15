"""A comparison in tables: what each place says and sorts by, the answer in words, and all of it for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from manyheads.compare.composed import ALL, compositional
from manyheads.compare.growth import TOO_NOISY, overlap
from manyheads.compare.summary import SOURCES, missing_sections, quality_against_state, summarise, tasks_of, tied_by
from manyheads.runs.results import Results, cells_of, failures_of, number
from manyheads.runs.tables import Column, Entry, bytes_text, count_text, failure_lines, rich_table, seconds_text
from manyheads.tasks.cab import CAB

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
    decoding = f"Fastest to decode at context {context}"
    lines += _least(decoded, "decode_ms", decoding, lambda ms: f"{ms:.3g} ms a token", "decode_between")
    longest = max((row["speed_n"] for row in rows if row["speed_n"] is not None), default=None)
    alike = [row for row in rows if row["causal"] == any(row["causal"] for row in rows)]
    sort = "causal" if any(row["causal"] for row in rows) else "noncausal"
    timed = [row for row in alike if row["speed_n"] == longest is not None]
    fastest = f"Fastest {sort} forward pass at n = {longest}"
    lines += _least(timed, "forward_s", fastest, seconds_text, "forward_between")
    return lines + _growth_lines(alike, sort) + _counted_failures(results)


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
    """Who was best, or all that no measurement told from it: then none of them is."""
    ranked = [(row["mechanism"], row["quality"][task]) for row in rows if row["quality"][task]["mean"] is not None]
    if not ranked:
        return f"No mechanism finished {task}."
    higher = ranked[0][1]["higher_is_better"]
    ranked.sort(key=lambda pair: pair[1]["mean"], reverse=higher)
    best = ranked[0][1]
    close = [(name, found) for name, found in ranked if found is best or tied_by(best, found)]
    metric, better = str(best["metric"]).replace("_", " "), f"({'higher' if higher else 'lower'} is better)"
    if len(close) > 1:
        found_so = dict.fromkeys(tied_by(best, found) for _, found in close[1:])
        answers = f" ({best['answers']:,} answers)" if best["answers"] else ""
        reasons = " or ".join(why + answers * why.endswith("test set") for why in found_so)
        between = f"{metric} {best['mean']:.3f} to {close[-1][1]['mean']:.3f} {better}"
        line = f"Tie at {task}: {', '.join(name for name, _ in close)}: {between}, apart by no more than {reasons}."
    else:
        line = f"Best at {task}: {ranked[0][0]}, {metric} {_spread(best)} {better}."
    partly = [f"{name} {found['seeds']} of {found['planned']}" for name, found in close if _unfinished(found)]
    if partly:
        line += f" Means are over the seeds that finished: {', '.join(partly)}; the others failed."
    if best["seeds"] < 2:
        return line + (" Its spread is unknown." if partly else " One seed, so its spread is unknown.")
    front = unbeaten(results, task)
    return line + (f" Unbeaten at their state size, smallest first: {', '.join(front)}." if len(front) > 1 else "")


def _unfinished(quality: Mapping[str, Any]) -> bool:
    return bool(quality["seeds"] < quality["planned"])


def unbeaten(results: Results, task: str) -> list[str]:
    """Smallest state first: each better than all before it by more than the error of the figures."""
    kept: list[Mapping[str, Any]] = []
    for point in sorted(quality_against_state(results, task)[0], key=lambda point: point["state_bytes"]):
        if point["pareto"] and not any(tied_by(point, other) for other in kept):
            kept.append(point)
    return [point["mechanism"] for point in kept]


def _least(rows: Sequence[Mapping[str, Any]], key: str, words: str, text: Any, between: str = "") -> list[str]:
    """between: the key of what repeated timings lie between; where those of two overlap, neither is the least."""
    known = [row for row in rows if row[key] is not None]
    if not known:
        return []
    least = min(known, key=lambda row: row[key])
    equal = [row for row in known if row[key] == least[key]]
    line = f"{words}: {', '.join(row['mechanism'] for row in equal)}, {text(least[key])}."
    if not between or len(known) == len(equal):
        return [line]
    if any(row[between] is None for row in known):
        return [f"{line} Not all were timed in several turns, so the error of this is unknown."]
    close = [row for row in known if row[between][0] <= least[between][1]]
    if len(close) == 1:
        return [line]
    names, most = ", ".join(row["mechanism"] for row in close), max(row[key] for row in close)
    return [f"{words}: tie of {names}, {text(least[key])} to {text(most)}: their timings overlap."]


def _growth_lines(rows: Sequence[Mapping[str, Any]], sort: str) -> list[str]:
    """The slowest growth where its interval stands alone; else who shares it; and whose times told nothing."""
    known = sorted(
        (row for row in rows if row["forward_exponent"] is not None), key=lambda row: row["forward_exponent"]
    )
    lines = []
    if known:
        close = [row for row in known if overlap(row["forward_interval"], known[0]["forward_interval"])]
        names, text = ", ".join(row["mechanism"] for row in close), _power(known[0], "forward")
        if len(close) > 1:
            text = f"tie of {names}, {text} to {_power(close[-1], 'forward')}: their intervals overlap."
            lines.append(f"Least growth of {sort} time with length: {text}")
        else:
            lines.append(f"Slowest growth of {sort} time with length: {names}, {text}.")
    noisy = [row["mechanism"] for row in rows if row["forward_growth"] == TOO_NOISY]
    return [*lines, *([f"Too noisy to tell how time grows with length: {', '.join(noisy)}."] if noisy else [])]


def _spread(quality: Mapping[str, Any]) -> str:
    deviation = f" ± {quality['std']:.3f}" if quality["std"] is not None else ""
    return f"{quality['mean']:.3f}{deviation}"


def summary_table(results: Results) -> tuple[list[Column], list[list[Entry]]]:
    """Columns for which some mechanism has a figure or a failure, and a line of entries per mechanism."""
    rows = summarise(results)
    kinds = {cell["kind"] for cell in cells_of(results)}
    made = _quality_columns(results, rows)
    made += _index_columns(rows)
    if "quality" in kinds:
        made.append(_column(rows, "Parameters", "parameters", "quality", count_text))
    if "speed" in kinds:
        made += _speed_columns(rows)
    if "memory" in kinds:
        made.append(_growth_column(rows, "memory", "Memory", "memory"))
    if "decode" in kinds:
        made += _decode_columns(rows)
    made.append((Column("Failed", "cells", down=True), [_failed_entry(row) for row in rows]))
    names = [Entry(row["mechanism"], row["mechanism"]) for row in rows]
    columns = [Column("Mechanism", number=False), *(column for column, _ in made)]
    return columns, [list(line) for line in zip(names, *(entries for _, entries in made), strict=True)]


def _quality_columns(results: Results, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Column, list[Entry]]]:
    made: list[tuple[Column, list[Entry]]] = []
    for task in tasks_of(results):
        first: Mapping[str, Any] = next((row["quality"][task] for row in rows if row["quality"][task]["metric"]), {})
        metric = str(first.get("metric", "quality")).replace("_", " ")
        higher = bool(first.get("higher_is_better", True))
        note = f"{metric}, {'higher' if higher else 'lower'} is better; {SOURCES['quality']}"
        made.append(_hoist(Column(task, note, down=higher), [_quality_entry(row, task) for row in rows]))
        made += _beyond_columns(rows, task, note, higher)
    return made


def _beyond_columns(
    rows: Sequence[Mapping[str, Any]], task: str, note: str, higher: bool
) -> list[tuple[Column, list[Entry]]]:
    """A column for each multiple of the trained length at which some contestant was scored, or was to be."""
    lengths = sorted({point["times"] for row in rows for point in row["quality"][task]["beyond"]})
    made = []
    for times in lengths:
        column = Column(f"{task} ×{times}", f"{note}; at {times} times the trained length", down=higher)
        made.append(_hoist(column, [_beyond_entry(row["quality"][task]["beyond"], times) for row in rows]))
    return made


def _beyond_entry(points: Sequence[Mapping[str, Any]], times: int) -> Entry:
    point = next((point for point in points if point["times"] == times), None)
    if point is None or point["mean"] is None:
        return Entry("–") if point is None else Entry("cannot", notes=(point["error"],), bad=True)
    return Entry(_spread(point), point["mean"])


def _beyond_lines(results: Results) -> list[str]:
    """Who has no score beyond the trained length, and why."""
    said: dict[str, None] = {}
    for row in summarise(results):
        for task, quality in row["quality"].items():
            for point in quality["beyond"]:
                if point["error"]:
                    said[f"no score at {task} ×{point['times']}, {row['mechanism']}: {point['error']}"] = None
    return list(said)


def _index_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Column, list[Entry]]]:
    """CAB's index over all its tasks, and over those of each pattern; no column where these are not the tasks."""
    found = compositional(rows)
    made = []
    for which in (ALL, *CAB) if found else ():
        scores = [found.get(row["mechanism"], {}).get(which) for row in rows]
        entries = [Entry("–") if score is None else Entry(f"{score:+.2f}", score) for score in scores]
        note = "mean over tasks of deviations from the run's mean, higher is better"
        made.append((Column(f"Index, {which}", note, down=True), entries))
    return made


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
    return _hoist(Column(title, SOURCES[key], brief=title.replace("eter", "")), entries)


def _hoist(column: Column, entries: Sequence[Entry]) -> tuple[Column, list[Entry]]:
    """Notes that all entries share move to the column's title, so that each row says only what is its own."""
    noted = [entry.notes for entry in entries if entry.notes]
    shared = [note for note in noted[0] if all(note in notes for notes in noted)] if noted else []
    kept = [replace(entry, notes=tuple(n for n in entry.notes if n not in shared)) for entry in entries]
    return replace(column, note="; ".join([part for part in (column.note, *shared) if part])), kept


def _power(row: Mapping[str, Any], which: str) -> str:
    low, high = row[f"{which}_interval"]
    return f"n^{row[f'{which}_exponent']:.2f} ±{(high - low) / 2:.2f}"


def _growth_column(rows: Sequence[Mapping[str, Any]], which: str, title: str, kind: str) -> tuple[Column, list[Entry]]:
    entries = []
    for row in rows:
        failed = kind in row["failed_kinds"] and not row[f"{which}_growth"]
        text, sort = row[f"{which}_growth"] or ("failed" if failed else "–"), None
        notes: tuple[str, ...] = ()
        if row[f"{which}_exponent"] is not None:
            text, _, within = _power(row, which).partition(" ")  # a terminal has no room for the interval
            sort, notes = row[f"{which}_exponent"], (within,)
        if row[f"{which}_range"] is not None:
            low, high = row[f"{which}_range"]
            notes += (f"n {low:,}–{high:,}", *(["noncausal"] if row["causal"] is False else []))
        entries.append(Entry(text, sort, notes, bad=text == "failed"))
    column = Column(f"{title} growth", SOURCES[f"{which}_exponent"], brief=title)
    return _hoist(column, entries)


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

    growth = _growth_column(rows, "forward", "Time", "speed")
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
    if lines:
        quality = 1 + len(_quality_columns(results, summarise(results)))
        if quality > 1:
            console.print(rich_table(columns[:quality], lines, range(quality)))
        console.print(rich_table(columns, lines, [0, *range(quality, len(columns))]))
    for sentence in [*headline(results), *missing_sections(results)]:
        console.print(Text(sentence))
    for line in [*_undeclared_lines(results), *_beyond_lines(results)]:
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
