"""Runs an experiment: cells that are stored are not run again, every other is stored as soon as it is finished."""

from __future__ import annotations

import json
import logging
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import manyheads
from manyheads.environment import environment

from . import worker
from .cells import Cell, cells_of_experiment
from .experiment import Experiment
from .progress import Progress
from .store import Store, now
from .summary import SCHEMA, done, number, write_csv, write_json

Outcome = dict[str, Any]
_CONNECT_SECONDS = 10.0
_PRIVATE = ("traceback", "stop", "machine")  # stay in the cell's file


class Chain:
    """Cells that are run in order: where one says `stop`, those after it are not tried."""

    def __init__(self, cells: Sequence[Cell], stored: Mapping[str, Outcome]) -> None:
        self._cells, self._stored = list(cells), stored
        self._stop = ""

    def take(self) -> tuple[Cell, Outcome | None] | None:
        """The next cell, with its outcome where that is known without running it; None at the end."""
        if not self._cells:
            return None
        cell = self._cells.pop(0)
        if cell.key in self._stored:
            self.finished(self._stored[cell.key])
            return cell, self._stored[cell.key]
        if cell.undeclared:
            return cell, {**cell.row, "status": "undeclared", "error": cell.undeclared}
        if self._stop:
            return cell, {**cell.row, "status": "failed", "error": f"not tried: {self._stop}"}
        return cell, None

    def finished(self, outcome: Outcome) -> None:
        self._stop = self._stop or outcome.get("stop", "")


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
        held = {cell.key: store.load(cell) for cell in cells}
        stored = {k: v for k, v in held.items() if v is not None and not (retry_failed and v["status"] == "failed")}
        with _cluster(scheduler) as client:
            seen = progress(cells, at_once=_at_once(client))
            for warning in [*store.warnings, *_mixed(stored.values())]:
                seen.note(f"warning: {warning}")
            ran = _local(cells, stored, seen) if client is None else _spread(client, cells, stored, seen)
            outcomes = _collected(ran, cells, store, seen, Path(out))
        results = results_of(experiment, [outcomes[id(cell)] for cell in cells])
        write_outputs(results, Path(out))
    return results


def _collected(
    ran: Iterable[tuple[Cell, Outcome, bool]], cells: Sequence[Cell], store: Store, seen: Progress, out: Path
) -> dict[int, Outcome]:
    """Stores outcomes as they come; on any end before the last, says what is kept."""
    outcomes: dict[int, Outcome] = {}
    try:
        for cell, outcome, fresh in ran:
            if fresh:
                store.save(cell, outcome)
                seen.end(cell, outcome)
            else:
                seen.known(cell, outcome)
            outcomes[id(cell)] = outcome
    except BaseException:
        seen.close()
        seen.note(
            f"stopped with {len(outcomes)} of {len(cells)} cells finished and kept in {out}; "
            "run the same command again to go on from there"
        )
        raise
    seen.close()
    return outcomes


# -- where cells run -----------------------------------------------------------------------------------------------


def _chains(cells: Sequence[Cell], stored: Mapping[str, Outcome]) -> list[Chain]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.chain or cell.key, []).append(cell)
    return [Chain(group, stored) for group in groups.values()]


def _local(
    cells: Sequence[Cell], stored: Mapping[str, Outcome], seen: Progress
) -> Iterator[tuple[Cell, Outcome, bool]]:
    """One after another, in this process."""
    for chain in _chains(cells, stored):
        while True:
            known, cell = _until_unknown(chain)
            yield from known
            if cell is None:
                break
            seen.begin(cell)
            outcome = cell.row | worker.run_cell(cell.kind, cell.settings)
            chain.finished(outcome)
            yield cell, outcome, True


def _spread(
    client: Any, cells: Sequence[Cell], stored: Mapping[str, Outcome], seen: Progress
) -> Iterator[tuple[Cell, Outcome, bool]]:
    """On the workers of a Dask cluster, one cell at a time on each: what runs beside a cell would spoil its times, and
    would share the blame where the worker dies. Then the cell is run again elsewhere, as often as the scheduler's
    `allowed-failures` says; after that it is a failed row."""
    from distributed import as_completed

    waiting = deque(_chains(cells, stored))
    running: dict[Any, tuple[Cell, Chain]] = {}
    finished = as_completed(loop=client.loop)
    try:
        while waiting or running:
            while waiting and len(running) < _at_once(client):
                chain = waiting.popleft()
                known, cell = _until_unknown(chain)
                yield from known
                if cell is None:
                    continue
                key = f"{cell.key}-{uuid.uuid4().hex[:8]}"
                future = client.submit(worker.run_cell, cell.kind, dict(cell.settings), key=key, pure=False)
                running[future] = (cell, chain)
                finished.add(future)
                seen.begin(cell)
            if not running:
                continue
            future = next(finished)
            cell, chain = running.pop(future)
            outcome = cell.row | _outcome_of(future)
            chain.finished(outcome)
            waiting.appendleft(chain)
            yield cell, outcome, True
    finally:
        client.cancel(list(running))


def _until_unknown(chain: Chain) -> tuple[list[tuple[Cell, Outcome, bool]], Cell | None]:
    """Outcomes that need no work, and then the next cell to run, if there is one."""
    known: list[tuple[Cell, Outcome, bool]] = []
    while (taken := chain.take()) is not None:
        cell, outcome = taken
        if outcome is None:
            return known, cell
        known.append((cell, outcome, False))
    return known, None


def _outcome_of(future: Any) -> Outcome:
    from concurrent.futures import CancelledError

    from distributed import KilledWorker

    try:
        outcome: Outcome = future.result()
    except CancelledError:
        raise ConnectionError(
            "the Dask scheduler is gone; start it and run the same command again, finished cells are kept"
        ) from None
    except KilledWorker:
        words = "every worker that ran this cell died, most likely for lack of memory"
        return {"status": "failed", "error": words, "stop": words}
    except Exception as error:
        return worker.failure(error)
    return outcome


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """A client of the Dask scheduler at the address, whose workers were seen to be of this version; or None."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--scheduler needs Dask: pip install 'manyheads[cluster]'") from None
    for name in ("distributed", "distributed.client"):  # what matters of it is told below, without tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no Dask scheduler answers at {address!r} ({type(error).__name__}: {error}); want an address such as "
            "tcp://127.0.0.1:8786, as `dask scheduler` prints it"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=30)
        except TimeoutError:
            raise ValueError(
                f"the scheduler at {address} has no workers; start some with `dask worker {address}`"
            ) from None
        try:
            found = client.run(worker.version)
        except ImportError as error:
            raise ValueError(f"a worker cannot import manyheads ({error}); install it there") from None
        others = {name: other for name, other in found.items() if other != manyheads.__version__}
        if others:
            raise ValueError(f"workers have other versions than {manyheads.__version__}, which is here: {others}")
        yield client


def _at_once(client: Any) -> int:
    return 1 if client is None else max(1, len(client.nthreads()))


def _mixed(stored: Iterable[Outcome]) -> Iterator[str]:
    """A warning where stored times come from another machine or number of threads than new ones will."""
    here = worker.machine()
    others = [o for o in stored if o["kind"] != "quality" and o.get("machine") not in (None, here)]
    if others:
        yield (
            f"{len(others)} stored cells were measured elsewhere ({others[0]['machine']}, here {here}): times do not "
            "compare; choose another --out to measure all of them here"
        )


# -- results -------------------------------------------------------------------------------------------------------


def results_of(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All that the report reads: the cells, with the best learning rate marked, and where they come from."""
    cells = [{k: v for k, v in outcome.items() if k not in _PRIVATE} for outcome in outcomes]
    mark_best(cells)
    facts = environment()
    machines = {json.dumps(outcome["machine"]) for outcome in outcomes if outcome.get("machine")}
    if machines - {json.dumps(worker.machine())}:
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
