"""Cells on many machines: the workers of a Dask scheduler."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import manyheads
from manyheads.runs.cells import Cell
from manyheads.runs.loop import Chain, Outcome, Runner, here, run_cells, until_unknown
from manyheads.runs.outcome import failure
from manyheads.runs.progress import Progress
from manyheads.runs.store import Store

_CONNECT_SECONDS = 10.0
# Random state and the clock are shared by all threads of a worker.
_one_at_a_time = threading.Lock()
Measure = Callable[[Cell], Mapping[str, Any]]


class Showing(Protocol):
    def __call__(self, cells: Sequence[Cell], /, *, at_once: int) -> Progress: ...


def run_anywhere(
    cells: Sequence[Cell],
    store: Store,
    measure: Measure,
    progress: Showing,
    *,
    scheduler: str | None = None,
    away: Measure | None = None,
    retry_failed: bool = False,
    warn: Callable[[Iterable[Outcome]], Iterable[str]] = lambda stored: (),
) -> list[Outcome]:
    """`run_cells` in this process or, by the address of a Dask scheduler, on its workers. away: what a worker calls, a
    function of a module or a `partial` of one with plain data; `measure` where it is None."""
    with cluster(scheduler) as client:
        return run_cells(
            cells,
            store,
            here(measure) if client is None else spread(client, measure if away is None else away),
            lambda own: progress(own, at_once=at_once(client)),
            retry_failed=retry_failed,
            warn=warn,
        )


def spread(client: Any, measure: Measure) -> Runner:
    """measure(cell) on the workers of a cluster, one cell at a time on each: what runs beside a cell would
    spoil its times, and would share the blame where the worker dies. Then the cell is run again elsewhere, as often as
    the scheduler's `allowed-failures` says; after that it is a failed row."""

    def run(chains: Sequence[Chain], seen: Progress) -> Iterator[tuple[Cell, Outcome, bool]]:
        from distributed import as_completed

        waiting = deque(chains)
        running: dict[Any, tuple[Cell, Chain]] = {}
        finished = as_completed(loop=client.loop)
        try:
            while waiting or running:
                while waiting and len(running) < at_once(client):
                    chain = waiting.popleft()
                    known, cell = until_unknown(chain)
                    yield from known
                    if cell is None:
                        continue
                    key = f"{cell.key}-{uuid.uuid4().hex[:8]}"
                    future = client.submit(partial(_alone, measure), cell, key=key, pure=False)
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

    return run


def _alone(measure: Measure, cell: Cell) -> Outcome:
    with _one_at_a_time:
        return dict(measure(cell))


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
        return failure(error)
    return outcome


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
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
            found = client.run(version)
        except ImportError as error:
            raise ValueError(f"a worker cannot import manyheads ({error}); install it there") from None
        others = {name: other for name, other in found.items() if other != manyheads.__version__}
        if others:
            raise ValueError(f"workers have other versions than {manyheads.__version__}, which is here: {others}")
        yield client


def at_once(client: Any) -> int:
    return 1 if client is None else max(1, len(client.nthreads()))


def version() -> str:
    return manyheads.__version__
