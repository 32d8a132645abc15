"""Tables of any run: what each place says and sorts by, for pages and for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from manyheads.runs.results import Cell, Results, failures_of


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


def failure_lines(results: Results) -> list[str]:
    """One line for all cells of a mechanism that failed with the same words."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for failure in failures_of(results):
        if failure["status"] != "undeclared":
            groups.setdefault((failure["mechanism"], _first_line(failure["error"])), []).append(failure)
    return [
        f"failed: {name}, {where(cells[0])}{f' and {len(cells) - 1} more' if len(cells) > 1 else ''}: {error}"
        for (name, error), cells in groups.items()
    ]


def rich_table(columns: Sequence[Column], lines: Sequence[Sequence[Entry]], kept: Iterable[int]) -> Table:
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


def where(cell: Cell) -> str:
    """'quality recall, n 64, seed 0, lr 0.003': which cell this is."""
    words = [str(cell["kind"]) + (f" {cell['task']}" if cell.get("task") else "")]
    for key, word in (("n", "n"), ("context", "context"), ("seed", "seed"), ("learning_rate", "lr")):
        if cell.get(key) is not None:
            words.append(f"{word} {cell[key]}")
    if cell.get("causal") is not None:
        words.append("causal" if cell["causal"] else "noncausal")
    return ", ".join(words)
