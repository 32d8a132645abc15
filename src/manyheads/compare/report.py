"""A comparison for people: one offline HTML page, and a table for the terminal.

Names, errors and settings come from outside: everything written into the page goes through `html.escape`, and what
goes into a script is JSON without a `<`.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from .summary import (
    SOURCES,
    Cell,
    Results,
    cells_of,
    done,
    failures_of,
    mechanisms_of,
    missing_sections,
    number,
    quality_against_state,
    summarise,
    tasks_of,
    write_atomically,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOTES = (
    "Measured on this machine: quality, forward and backward time (medians), peak memory (above the start of a fresh "
    "process) and decode time. Times on a shared machine wander: trust ratios within one run before absolute numbers.",
    "Counted, not timed: parameters, FLOPs, and state bytes (the bytes of the tensors that a decoding state holds).",
    "Derived from measurements: the growth p of y ~ n^p is a least-squares fit on logarithms over the upper half of "
    "the lengths; the crossover is interpolated on logarithms between measured lengths, against softmax "
    "(scaled_dot_product_attention) called in the same way.",
    "Quality is the mean over seeds at the learning rate that was selected, with the sample standard deviation.",
)


@dataclass(frozen=True)
class Entry:
    """One place in a table: what it says, what it sorts by (None sorts last), small words below."""

    text: str
    sort: float | str | None = None
    notes: tuple[str, ...] = ()
    bad: bool = False


@dataclass(frozen=True)
class Column:
    """note: unit and source. number: sorts as a number. down: first click sorts descending. brief: for terminals."""

    title: str
    note: str = ""
    number: bool = True
    down: bool = False
    brief: str = ""


def bytes_text(value: float | None) -> str:
    """1536 -> '1.5 KiB'."""
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if abs(value) < 999.5 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def count_text(value: float | None) -> str:
    """1234567 -> '1.23 M'."""
    if value is None:
        return "–"
    for unit in ("", " k", " M", " G", " T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} P"


def seconds_text(value: float | None) -> str:
    """0.0123 -> '12.3 ms'."""
    if value is None:
        return "–"
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


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
            console.print(_rich_table(columns[: tasks + 1], lines, range(tasks + 1)))
        console.print(_rich_table(columns, lines, [0, *range(tasks + 1, len(columns))]))
    for sentence in [*headline(results), *missing_sections(results)]:
        console.print(Text(sentence))
    for line in _undeclared_lines(results):
        console.print(Text(line, style="dim"))
    for line in _failure_lines(results):
        console.print(Text(line, style="red"), no_wrap=True, overflow="ellipsis")


def _undeclared_lines(results: Results) -> list[str]:
    """One line for all mechanisms that do not declare what a task, or a measurement, needs."""
    groups: dict[str, dict[str, None]] = {}
    for failure in failures_of(results):
        if failure["status"] == "undeclared":
            groups.setdefault(failure.get("task") or failure["kind"], {})[failure["mechanism"]] = None
    return [f"not declared, {what}: {', '.join(names)}" for what, names in groups.items()]


def _failure_lines(results: Results) -> list[str]:
    """One line for all cells of a mechanism that failed with the same words."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for failure in failures_of(results):
        if failure["status"] != "undeclared":
            groups.setdefault((failure["mechanism"], _first_line(failure["error"])), []).append(failure)
    return [
        f"failed: {name}, {_where(cells[0])}{f' and {len(cells) - 1} more' if len(cells) > 1 else ''}: {error}"
        for (name, error), cells in groups.items()
    ]


def _rich_table(columns: Sequence[Column], lines: Sequence[Sequence[Entry]], kept: Iterable[int]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    places = list(kept)
    for place in places:
        justify: Any = "left" if place == 0 else "right"
        title = Text(columns[place].brief or columns[place].title)
        table.add_column(title, justify=justify, overflow="fold", min_width=14 if place == 0 else None)
    for line in lines:
        table.add_row(*(Text(line[place].text, style="red" if line[place].bad else "") for place in places))
    return table


def _first_line(text: str) -> str:
    return next((line for line in str(text).splitlines() if line.strip()), "no error given")


def _where(cell: Cell) -> str:
    """'quality recall, n 64, seed 0, lr 0.003': which cell this is."""
    words = [str(cell["kind"]) + (f" {cell['task']}" if cell.get("task") else "")]
    for key, word in (("n", "n"), ("context", "context"), ("seed", "seed"), ("learning_rate", "lr")):
        if cell.get(key) is not None:
            words.append(f"{word} {cell[key]}")
    if cell.get("causal") is not None:
        words.append("causal" if cell["causal"] else "noncausal")
    return ", ".join(words)


def write_report(results: Results, path: str | Path) -> Path:
    """The whole comparison as one HTML file that asks nothing of any other."""
    from .charts import plots, theme

    drawn = plots(results)
    names = mechanisms_of(results)
    drawing = {
        "specs": {plot.name: plot.spec("container") for plot in drawn},
        "themes": {scheme: theme(scheme) for scheme in ("light", "dark")},
        "widest": max(map(len, names), default=1),
    }
    learning = [plot for plot in drawn if plot.name.startswith("learning-")]
    sections = [
        ("answer", "Answer", _answer_html(results)),
        ("summary", "Summary", _table_html(*summary_table(results), "One row per mechanism. Press a title to sort.")),
        ("failures", "Failures", _failures_html(results)),
        ("charts", "Charts", _charts_html([plot for plot in drawn if plot not in learning])),
        ("learning", "Learning curves", _charts_html(learning)),
        ("cells", "Every cell", _cells_html(results)),
        ("figures", "What is measured, what is counted", "".join(f"<p>{_safe(note)}</p>" for note in NOTES)),
        ("environment", "Environment", _settings_html(results.get("environment", {}))),
        ("settings", "Every setting", _settings_html(results.get("experiment", {}))),
    ]
    title = f"{len(names)} mechanism{'s' * (len(names) != 1)} compared"
    subtitle = f"manyheads {results.get('manyheads', '')} · {results.get('created', '')}"
    template = Template(files("manyheads.compare").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=_safe(title),
        subtitle=_safe(subtitle),
        navigation=" ".join(f'<a href="#{key}">{_safe(words)}</a>' for key, words, _ in sections[1:]),
        body="\n".join(_section_html(*section) for section in sections),
        charts=script_json(drawing),
        libraries=_libraries() if drawn else "",
    )
    return write_atomically(path, page)


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, so nothing in it can end the element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _libraries() -> str:
    """vega-embed with all that it needs, as one script."""
    import vl_convert

    from .charts import vega_lite_version

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vega_lite_version())
    return re.sub("</(?=script)", r"<\\/", bundle, flags=re.IGNORECASE)


def _safe(value: Any) -> str:
    return html.escape(str(value))


def _section_html(key: str, title: str, body: str) -> str:
    head = f'<section id="{key}" aria-labelledby="{key}-title">\n<h2 id="{key}-title">{_safe(title)}</h2>'
    return f"{head}\n{body}\n</section>"


def _answer_html(results: Results) -> str:
    environment = results.get("environment", {})
    known = [str(environment[key]) for key in ("cpu", "device") if environment.get(key)]
    machine = f"On this machine ({', '.join(known)})" if known else "On this machine"
    items = "".join(f"<li>{_safe(line)}</li>" for line in headline(results))
    left_out = "".join(f'<p class="faint">{_safe(line)}</p>' for line in missing_sections(results))
    return f'<div class="answer"><p>{_safe(machine)}, for these tasks and settings:</p><ul>{items}</ul></div>{left_out}'


def _table_html(columns: Sequence[Column], lines: Sequence[Sequence[Entry]], caption: str) -> str:
    if not lines:
        return "<p>Nothing to show.</p>"
    head = "".join(
        f'<th scope="col" aria-sort="none" data-number="{"yes" if column.number else "no"}"'
        f' data-first="{"descending" if column.down else "ascending"}"{"" if column.number else " class=text"}>'
        f'<button type="button"><span>{_safe(column.title)}</span>'
        f"{'<small>' + _safe(column.note) + '</small>' if column.note else ''}</button></th>"
        for column in columns
    )
    body = "\n".join("<tr>" + "".join(map(_entry_html, columns, line, range(len(line)))) + "</tr>" for line in lines)
    top = f"<caption>{_safe(caption)}</caption><thead><tr>{head}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table class="sorts">{top}\n<tbody>\n{body}\n</tbody></table></div>'


def _entry_html(column: Column, entry: Entry, place: int) -> str:
    known = entry.sort is not None and not (column.number and entry.sort != entry.sort)
    sort = f' data-sort="{_safe("Infinity" if entry.sort == math.inf else entry.sort)}"' if known else ""
    note = f"<small>{_safe(', '.join(entry.notes))}</small>" if entry.notes else ""
    text = f'<span class="bad">{_safe(entry.text)}</span>' if entry.bad else _safe(entry.text)
    if place == 0:
        return f'<th scope="row"{sort}>{text}{note}</th>'
    return f"<td{'' if column.number else ' class=text'}{sort}>{text}{note}</td>"


def _failures_html(results: Results) -> str:
    failures = failures_of(results)
    if not failures:
        return "<p>No cell failed.</p>"
    columns = [Column("Mechanism", number=False), Column("Cell", number=False), Column("Error", number=False)]
    lines = [
        [Entry(str(text), str(text)) for text in (failure["mechanism"], _where(failure), failure["error"])]
        for failure in failures
    ]
    return _table_html(columns, lines, f"{len(failures)} of {len(cells_of(results))} cells have no figure.")


def _charts_html(drawn: Sequence[Any]) -> str:
    if not drawn:
        return "<p>No figures to draw.</p>"
    figures = "\n".join(
        f"<figure{' class=wide' if plot.wide else ''}><figcaption><h3>{_safe(plot.title)}</h3>"
        f"<p>{_safe(plot.text)}</p></figcaption>"
        f'<div class="chart" data-chart="{_safe(plot.name)}"></div></figure>'
        for plot in drawn
    )
    hint = "Point at a mark for its figures; click a name in a legend to see that mechanism alone."
    return f'<p class="faint">{hint}</p><div class="charts">{figures}</div>'


def _cells_html(results: Results) -> str:
    """A table per kind of cell, closed until asked for; a failed cell keeps its row and shows its error."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells_of(results):
        groups.setdefault(str(cell["kind"]), []).append(cell)
    made = [
        f"<details><summary>{_safe(kind)}: {len(cells)} cells</summary>{_kind_html(kind, cells)}</details>"
        for kind, cells in groups.items()
    ]
    return "\n".join(made) or "<p>Nothing to show.</p>"


def _kind_html(kind: str, cells: Sequence[Cell]) -> str:
    keys = list(dict.fromkeys(key for cell in cells for key in cell))
    keys = [key for key in keys if key not in ("kind", "mechanism", "error", "curve")]
    keys += ["error"] * any(cell.get("error") for cell in cells)
    numeric = {key: all(number(cell.get(key)) is not None or cell.get(key) is None for cell in cells) for key in keys}
    columns = [Column("mechanism", number=False), *(Column(key.replace("_", " "), number=numeric[key]) for key in keys)]
    lines = [
        [Entry(str(cell["mechanism"]), str(cell["mechanism"])), *(_raw(cell, key) for key in keys)] for cell in cells
    ]
    return _table_html(columns, lines, f"{kind} cells, as they were stored")


def _raw(cell: Cell, key: str) -> Entry:
    value = cell.get(key)
    if value is None:
        return Entry("–")
    bad = key in ("status", "error") and not done(cell)
    if isinstance(value, float):
        return Entry(f"{value:.6g}", value, bad=bad)
    return Entry(str(value), value if number(value) is not None else str(value), bad=bad)


def _settings_html(settings: Mapping[str, Any]) -> str:
    flat = list(_flatten(settings))
    if not flat:
        return "<p>Not recorded.</p>"
    body = "\n".join(f'<tr><th scope="row">{_safe(k)}</th><td class="text">{_safe(v)}</td></tr>' for k, v in flat)
    return f'<div class="scroll" tabindex="0"><table><tbody>\n{body}\n</tbody></table></div>'


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted names for nested settings; a list of plain values stays in one line."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for place, item in enumerate(value):
            yield from _flatten(item, f"{prefix}[{place}]")
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(map(str, value))
    elif not isinstance(value, Mapping):
        yield prefix, value
