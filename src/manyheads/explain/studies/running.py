"""Runs a study: every point with every seed is a cell of its own, stored as it finishes and not run again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import manyheads
from manyheads.explain.studies.study import Study, create_study, source_of
from manyheads.runs.cells import Cell as Unit
from manyheads.runs.cells import same_here
from manyheads.runs.cluster import run_anywhere
from manyheads.runs.environment import environment
from manyheads.runs.given import read_json
from manyheads.runs.loop import public
from manyheads.runs.outcome import outcome_of
from manyheads.runs.progress import Progress, duration
from manyheads.runs.results import SCHEMA
from manyheads.runs.store import Store, now

MOST_SEEDS = 100


class Shown(Progress):
    """A comparison's progress, with a study's figures."""

    def __init__(self, columns: Mapping[str, str], units: Sequence[Unit], *, at_once: int = 1) -> None:
        super().__init__(units, at_once=at_once)
        self._columns = columns

    def told(self, outcome: Mapping[str, Any]) -> str:
        took = f" ({duration(outcome['seconds'])})" if "seconds" in outcome else ""
        if outcome["status"] != "done":
            return f"{outcome['status']}: {outcome['error']}"
        figures = [f"{title} {outcome[key]:.3g}" for key, title in self._columns.items() if key in outcome]
        return ", ".join(figures) + took


def run_study(
    name: str,
    out: str | Path,
    *,
    seeds: int | None = None,
    settings: Mapping[str, Any] | None = None,
    scheduler: str | None = None,
) -> dict[str, Any]:
    """Runs what is not stored in `out` yet, writes study.json and study.html there, and returns the results.

    seeds: how many, the study's own number without it. settings: the study's fields where they are not the defaults.
    scheduler: address of a Dask scheduler whose workers run the cells, instead of this process.
    An interrupted run keeps the cells that are finished; the same call goes on from there.
    """
    from manyheads.explain.studies.report import write_outputs

    study = create_study(name, **(settings or {}))
    count = study.seeds if seeds is None else seeds
    if not 1 <= count <= MOST_SEEDS:
        raise ValueError(f"{name}: {count} seeds; want 1 to {MOST_SEEDS}")
    _check_folder(Path(out), name)
    asked = {"study": name, "seeds": count, **study.config}
    with Store(out) as store:
        facts = environment()
        store.save_experiment(asked, facts)
        cells = run_anywhere(
            list(_units(study, range(count))),
            store,
            partial(run_unit, study),
            partial(Shown, study.columns),
            scheduler=scheduler,
            away=partial(_run_away, name, study.config),
            retry_failed=True,
        )
        results = {
            "schema": SCHEMA,
            "manyheads": manyheads.__version__,
            "created": now(),
            "environment": facts,
            "experiment": asked,
            "cells": public(cells),
        }
        return write_outputs(study, results, Path(out))


def _units(study: Study, seeds: Iterable[int]) -> Iterator[Unit]:
    """Seed by seed, so that a run that is stopped early has every point once."""
    source = hashlib.sha256(source_of(study).encode()).hexdigest()[:16]
    own = study.identity()
    for seed in seeds:
        for point in study.points():
            place = {key: value for key, value in point.items() if key != "label"} | {"seed": seed}
            settings = {"study": study.name, "config": study.config, "source": source, **own, **place}
            yield Unit("study", str(point["label"]), place, settings, "")


def run_unit(study: Study, unit: Unit) -> dict[str, Any]:
    """A point that diverges becomes a failed row and leaves the others alone."""
    return {**unit.row, **outcome_of(lambda: _figures(study, unit))}


def _run_away(name: str, settings: Mapping[str, Any], unit: Unit) -> dict[str, Any]:
    """`run_unit` on another machine, which makes the study anew."""

    def figures() -> dict[str, Any]:
        study = create_study(name, **settings)
        return _figures(study, same_here(unit, _units(study, [unit.place["seed"]])))

    return {**unit.row, **outcome_of(figures)}


def _figures(study: Study, unit: Unit) -> dict[str, Any]:
    found = study.measure({**unit.place, "label": unit.mechanism}, unit.place["seed"])
    assert not found.keys() & {*unit.row, "status", "error"}, "a figure has the name of a column"
    wild = [key for key, value in found.items() if key != "curve" and not math.isfinite(value)]
    if wild:
        raise ArithmeticError(f"training diverged: {', '.join(wild)} is not finite")
    return found


def _check_folder(out: Path, name: str) -> None:
    """A folder holds one study."""
    try:
        held = read_json(out / "experiment.json")["experiment"].get("study")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if held != name:
        what = "other results" if held is None else f"the study {held}"
        raise ValueError(f"{out} holds {what}; {name} wants another folder: choose one with --out")
