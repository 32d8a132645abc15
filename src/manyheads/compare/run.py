"""Runs an experiment: cells that are stored are not run again, every other is stored as soon as it is finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import manyheads
from manyheads.compare.cells import cells_of_experiment
from manyheads.compare.summary import write_csv
from manyheads.runs.cells import Cell
from manyheads.runs.cluster import run_anywhere
from manyheads.runs.environment import environment
from manyheads.runs.loop import Outcome, public
from manyheads.runs.outcome import machine, outcome_of
from manyheads.runs.processes import in_processes
from manyheads.runs.progress import Progress
from manyheads.runs.results import SCHEMA, done, number, write_json
from manyheads.runs.store import Store, now

from . import worker
from .experiment import Experiment


def run_experiment(
    experiment: Experiment,
    out: str | Path,
    *,
    scheduler: str | None = None,
    retry_failed: bool = False,
    progress: type[Progress] = Progress,
) -> dict[str, Any]:
    """Runs what is not stored in `out` yet, writes the report there, and returns the results.

    scheduler: address of a Dask scheduler whose workers run the cells, instead of this process.
    """
    cells = cells_of_experiment(experiment)
    with Store(out) as store:
        store.save_experiment(experiment.model_dump(mode="json"), environment())
        outcomes = run_anywhere(
            cells,
            store,
            partial(_measured, worker.run_cell),
            progress,
            scheduler=scheduler,
            retry_failed=retry_failed,
            warn=_mixed,
        )
        results = results_of(experiment, outcomes)
        write_outputs(results, Path(out))
    return results


def _measured(run_cell: Callable[[str, Mapping[str, Any]], Outcome], cell: Cell) -> Outcome:
    count = cell.settings.get("processes", 1)
    if count == 1:
        return run_cell(cell.kind, cell.settings)
    return outcome_of(lambda: in_processes(count, f"{worker.__name__}:run_cell", cell.kind, cell.settings))


def _mixed(stored: Iterable[Outcome]) -> Iterator[str]:
    """A warning where stored times come from another machine or number of threads than new ones will."""
    here_now = machine()
    others = [o for o in stored if o["kind"] != "quality" and o.get("machine") not in (None, here_now)]
    if others:
        yield (
            f"{len(others)} stored cells were measured elsewhere ({others[0]['machine']}, here {here_now}): times do "
            "not compare; choose another --out to measure all of them here"
        )


def results_of(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All that the report reads: the cells, with the best learning rate marked, and where they come from."""
    cells = public(outcomes)
    mark_best(cells)
    facts = environment()
    machines = {json.dumps(outcome["machine"]) for outcome in outcomes if outcome.get("machine")}
    if machines - {json.dumps(machine())}:
        facts["measured on"] = "; ".join(sorted(machines))
    return {
        "schema": SCHEMA,
        "manyheads": manyheads.__version__,
        "created": now(),
        "environment": facts,
        "experiment": experiment.model_dump(mode="json"),
        "cells": cells,
    }


def mark_best(cells: Sequence[Outcome]) -> None:
    """Sets `best` on the quality cells of the learning rate whose mean over the seeds is best, per mechanism and task.

    A rate at which a seed failed is chosen only where there is none at which all finished.
    """
    groups: dict[tuple[Any, ...], dict[float, list[Outcome]]] = {}
    for cell in cells:
        if cell["kind"] == "quality":
            rates = groups.setdefault((cell["mechanism"], cell["task"], cell["n"]), {})
            rates.setdefault(cell["learning_rate"], []).append(cell)
    for rates in groups.values():
        chosen = max(rates, key=lambda rate: _merit(rates[rate]))
        for rate, members in rates.items():
            for cell in members:
                cell["best"] = rate == chosen


def _merit(cells: Sequence[Outcome]) -> tuple[float, float]:
    """How many seeds finished, then their mean, the larger the better."""
    values = [cell["value"] for cell in cells if done(cell) and number(cell.get("value")) is not None]
    if not values:
        return 0.0, 0.0
    sign = 1 if cells[0].get("higher_is_better", True) else -1
    return len(values) / len(cells), sign * mean(values)


def write_outputs(results: Mapping[str, Any], out: Path) -> None:
    """results.json, results.csv, report.html and one PNG per chart."""
    from .charts import write_png
    from .report import write_report

    write_json(results, out / "results.json")
    write_csv(results, out / "results.csv")
    write_report(results, out / "report.html")
    write_png(results, out)
