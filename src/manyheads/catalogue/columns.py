"""Columns of the catalogue: how they are named, ordered, filtered and written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyheads.near import suggest

Row = Mapping[str, Any]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _bytes(value: float) -> str:
    """Of some thousand bytes: 13.0k, 1.21M."""
    size, unit = next((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if value >= s or s == 1)
    return f"{value / size:.3g}{unit}"


@dataclass(frozen=True)
class Column:
    """what: for a reader. write: a number as text, None for a column of words. best: which end comes first when sorted,
    least or most."""

    what: str
    write: Callable[[float], str] | None = None
    best: str = "least"


COLUMNS: dict[str, Column] = {
    "name": Column("the name in create_attention"),
    "family": Column("which part of attention it changes"),
    "pattern": Column("what it is called with; = holds where it is one of them"),
    "title": Column("the paper's title"),
    "reference": Column("the paper"),
    "time": Column("growth of time in the length"),
    "state": Column("growth of the decode state in the length; empty where it does not decode"),
    "recall": Column("accuracy of quick recall", _percent, "most"),
    "digits": Column("accuracy of quick digits", _percent, "most"),
    "exponent": Column("exponent of forward time, measured", lambda value: f"{value:.2f}"),
    "ms": Column("forward milliseconds at 8,192 tokens", lambda value: f"{value:.1f}"),
    "bytes": Column("bytes of the state behind 65,536 tokens", _bytes),
    "peer": Column("forward time over that of the best known package", lambda value: f"{value:.2f}"),
}
_CLOSED = ("family", "pattern", "time", "state")  # who asks for what none of them has has mistyped it
_TERM = re.compile(r"([A-Za-z_]\w*)(>=|<=|!=|=|<|>|~)(.*)", re.DOTALL)
_SPACED = re.compile(r"\s*(>=|<=|!=|=|<|>|~)\s*")


def column(name: str, option: str) -> Column:
    """ValueError, with the names there are, for one that is none."""
    if name not in COLUMNS:
        raise ValueError(f"{option}: no column {name!r}{suggest(name, COLUMNS)}; there are {', '.join(COLUMNS)}")
    return COLUMNS[name]


def value_of(row: Row, name: str) -> Any:
    """A number or None; a text, empty where there is none; for `pattern` the list of them."""
    if name == "pattern":
        return row["patterns"]
    return "" if name == "state" and not row["decodes"] else row[name]


def written(row: Row, name: str) -> str:
    """As a table shows it: blank where it was not measured."""
    value, write = value_of(row, name), COLUMNS[name].write
    if value is None:
        return ""
    return write(value) if write else ", ".join(value) if isinstance(value, list) else str(value)


def sort_rows(rows: Sequence[Row], name: str) -> list[Row]:
    """The best first, what was not measured last. A leading minus turns the order of the measured around."""
    key = name.removeprefix("-")
    most = (column(key, "--sort").best == "most") != name.startswith("-")
    known = [row for row in rows if value_of(row, key) not in (None, "")]
    rest = [row for row in rows if value_of(row, key) in (None, "")]
    return [*sorted(known, key=lambda row: value_of(row, key), reverse=most), *rest]


def where_rows(rows: Sequence[Row], text: str) -> list[Row]:
    """The rows for which every term holds: `state=1 recall>.9`. A term is a column, one of = != < <= > >= ~, a value;
    ~ holds where the value is part of the text, regardless of case. A value with spaces stands in quotes. Nothing but
    an empty value (`recall=`) holds for what was not measured. Raises ValueError for anything else, and where a family,
    pattern or growth is asked for that no row has."""
    try:
        terms = shlex.split(_SPACED.sub(r"\1", text))
    except ValueError as error:
        raise ValueError(f"--where {text!r}: {error}; close what is quoted") from None
    if not terms:
        raise ValueError(f"--where is empty: want terms such as state=1 recall>.9, of the columns {', '.join(COLUMNS)}")
    tests = [_term(term, rows) for term in terms]
    return [row for row in rows if all(test(row) for test in tests)]


def _term(text: str, rows: Sequence[Row]) -> Callable[[Row], bool]:
    found = _TERM.fullmatch(text)
    if found is None:
        raise ValueError(
            f"--where: {text!r} is no term; want COLUMN, one of = != < <= > >= ~, and a value, such as 'recall>.9' (in "
            f"quotes, as a shell takes > for itself), of the columns {', '.join(COLUMNS)}"
        )
    name, sign, wanted = found.groups()
    if column(name, "--where").write is None:
        return _text_term(name, sign, wanted, rows)
    if wanted == "" and sign in ("=", "!="):
        return lambda row: (value_of(row, name) is None) == (sign == "=")
    return _number_term(name, sign, wanted)


def _text_term(name: str, sign: str, wanted: str, rows: Sequence[Row]) -> Callable[[Row], bool]:
    if sign not in ("=", "!=", "~"):
        raise ValueError(f"--where: {name} is a text, which has no {sign}; want = (the whole of it), != or ~ (a part)")
    if name in _CLOSED and wanted and sign != "~":
        held = {each for row in rows for each in _listed(value_of(row, name)) if each}
        if rows and wanted not in held:
            raise ValueError(
                f"--where: no mechanism here has {name} {wanted!r}{suggest(wanted, held)}; there are "
                f"{', '.join(sorted(held))} (~ asks for a part)"
            )

    def holds(row: Row) -> bool:
        value = value_of(row, name)
        if sign == "~":
            return wanted.lower() in written(row, name).lower()
        return (wanted in value if isinstance(value, list) else wanted == value) == (sign == "=")

    return holds


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _number_term(name: str, sign: str, wanted: str) -> Callable[[Row], bool]:
    share = wanted.endswith("%")
    try:
        number = float(wanted.removesuffix("%")) / (100 if share else 1)
    except ValueError:
        number = float("nan")
    if sign not in _COMPARE or number != number:
        raise ValueError(
            f"--where: {name}{sign}{wanted}: {name} is a number ({COLUMNS[name].what}); want = != < <= > or >= and a "
            f"number, such as {name}>.9, or {name}= for what was not measured"
        )
    if COLUMNS[name].write is _percent and number > 1:
        raise ValueError(f"--where: {name} is a share from 0 to 1; want {name}{sign}{wanted}% or a number up to 1")
    compare = _COMPARE[sign]
    return lambda row: value_of(row, name) is not None and compare(value_of(row, name), number)
