"""Several values of a method's knob: the original, each value and the control are cells, kept and gone on from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from manyheads.convert.method import prove
from manyheads.convert.run import Conversion, allow, made_record
from manyheads.convert.saving import check_target, write_record
from manyheads.hosts.fingerprint import fingerprint
from manyheads.runs.cells import Cell, same_here
from manyheads.runs.cluster import run_anywhere
from manyheads.runs.environment import environment
from manyheads.runs.loop import Outcome
from manyheads.runs.outcome import outcome_of
from manyheads.runs.progress import Progress, duration
from manyheads.runs.store import Store

ORIGINAL, CONTROL = "original", "control"


def run_sweep(
    made: Conversion, out: Path, *, scheduler: str | None = None, again: Callable[[], Conversion] | None = None
) -> dict[str, Any]:
    """Measures every value of the plan, heals it where the plan says so, and writes the record into `out`, without
    weights. What is stored there is not done again.

    scheduler: address of a Dask scheduler whose workers run the cells. again: makes the same conversion on a worker, a
    function of a module or a `partial` of one with plain data. ValueError where a value failed: the others are kept,
    and the next run tries that one again.
    """
    check_target(out, made.loaded.where, weights=False)
    identities = prove(made.method, made.loaded.model, made.plan.values, made.rows)
    cells = cells_of(made)
    away = None if again is None else partial(_run_away, again, cells[0].key, out.resolve())
    with Store(out) as store:
        store.save_experiment({"verb": "convert", "method": made.method.name, **made.settings}, environment())
        outcomes = run_anywhere(
            cells, store, partial(run_cell, made, out), Shown, scheduler=scheduler, away=away, retry_failed=True
        )
    failed = next((outcome for outcome in outcomes if outcome["status"] != "done"), None)
    if failed is not None:
        raise ValueError(f"{failed['mechanism']}: {failed['error']}; what was measured is kept in {out}")
    lines = [line for outcome in outcomes for line in outcome["lines"]]
    record = {**made_record(made, lines), "identities": identities}
    write_record(out, record)
    allow(made.plan, lines, f"what was measured is in {out}")
    return record


def cells_of(made: Conversion) -> list[Cell]:
    """The original first, and last the control where anything is trained."""
    # Another value beside one changes nothing of it.
    plan = {key: value for key, value in asdict(made.plan).items() if key not in ("values", "max_damage", "dtype")}
    shared = {
        "method": made.method.name,
        "settings": made.method.settings,
        "plan": plan,
        "models": [asdict(fingerprint(model, "")) for model in made.models],
        "dtype": str(made.loaded.model.dtype),
        "texts": [hashlib.sha256(text.text.encode()).hexdigest()[:16] for text in (made.measured_on, made.trained_on)],
    }
    parts: list[tuple[str, str, int | None]] = [(ORIGINAL, ORIGINAL, None)]
    parts += [(made.method.title(value), "value", value) for value in made.plan.values]
    if made.plan.healing is not None or made.method.lesson is not None:
        parts.append((CONTROL, CONTROL, made.plan.values[-1]))
    return [Cell("convert", title, {}, {**shared, "part": part, "value": value}, "") for title, part, value in parts]


def run_cell(made: Conversion, out: Path, cell: Cell) -> Outcome:
    return {**cell.row, **outcome_of(lambda: _figures(made, out, cell))}


def _figures(made: Conversion, out: Path, cell: Cell) -> dict[str, Any]:
    run, part, value = made.begin(out), cell.settings["part"], cell.settings["value"]
    if part == ORIGINAL:
        made.original(run)
    elif part == CONTROL:
        made.control(run, value)
    else:
        made.value(run, value)
    run.forget()
    return {"lines": run.lines}


def _run_away(again: Callable[[], Conversion], key: str, out: Path, cell: Cell) -> Outcome:
    """`run_cell` on another machine."""

    def figures() -> dict[str, Any]:
        made = _held(again, key)
        return _figures(made, out, same_here(cell, cells_of(made)))

    return {**cell.row, **outcome_of(figures)}


_kept: dict[str, Conversion] = {}


def _held(again: Callable[[], Conversion], key: str) -> Conversion:
    """One at a time, for all cells of a sweep."""
    if key not in _kept:
        _kept.clear()
        _kept[key] = again()
    return _kept[key]


class Shown(Progress):
    """A line for each cell, with its figures; what happens in a cell has bars of its own."""

    def __init__(self, cells: Any, *, at_once: int = 1) -> None:
        super().__init__(cells, at_once=at_once, console=Console(stderr=True, highlight=False, force_terminal=False))

    def told(self, outcome: Mapping[str, Any]) -> str:
        took = f" ({duration(outcome['seconds'])})" if "seconds" in outcome else ""
        if outcome["status"] != "done":
            return f"{outcome['status']}: {outcome['error']}"
        found = [f"{line['bits_per_token']:.3f} bits per token" for line in outcome["lines"]]
        return (", then ".join(found) or "nothing to compare with") + took
