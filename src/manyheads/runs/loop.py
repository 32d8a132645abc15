"""The one loop of every run: stored cells are not run again, every other is stored as soon as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from manyheads.runs.cells import Cell
from manyheads.runs.progress import Progress
from manyheads.runs.store import Store

Outcome = dict[str, Any]
# The columns of a cell that only its own file keeps.
PRIVATE = ("traceback", "stop", "machine")
# Gives every cell of the chains with its outcome, and whether that was measured now.
Runner = Callable[["Sequence[Chain]", Progress], Iterator[tuple[Cell, Outcome, bool]]]


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


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    run: Runner,
    progress: Callable[[Sequence[Cell]], Progress],
    *,
    retry_failed: bool = False,
    warn: Callable[[Iterable[Outcome]], Iterable[str]] = lambda stored: (),
) -> list[Outcome]:
    """The outcomes in the order of the cells. run: here(measure), or a way to other machines. warn: what there is to
    say of the outcomes that were stored before. On any end before the last cell, says what is kept."""
    held = {cell.key: store.load(cell) for cell in cells}
    stored = {k: v for k, v in held.items() if v is not None and not (retry_failed and v["status"] == "failed")}
    seen = progress(cells)
    for warning in [*store.warnings, *warn(stored.values())]:
        seen.note(f"warning: {warning}")
    outcomes: dict[int, Outcome] = {}
    try:
        for cell, outcome, fresh in run(_chains(cells, stored), seen):
            if fresh:
                store.save(cell, outcome)
                seen.end(cell, outcome)
            else:
                seen.known(cell, outcome)
            outcomes[id(cell)] = outcome
    except BaseException:
        seen.close()
        seen.note(
            f"stopped with {len(outcomes)} of {len(cells)} cells finished and kept in {store.folder}; "
            "run the same command again to go on from there"
        )
        raise
    seen.close()
    return [outcomes[id(cell)] for cell in cells]


def public(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Outcomes as results hold them."""
    return [{key: value for key, value in outcome.items() if key not in PRIVATE} for outcome in outcomes]


def _chains(cells: Sequence[Cell], stored: Mapping[str, Outcome]) -> list[Chain]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.chain or cell.key, []).append(cell)
    return [Chain(group, stored) for group in groups.values()]


def here(measure: Callable[[Cell], Mapping[str, Any]]) -> Runner:
    """One cell after another, in this process. measure(cell) gives its columns and raises nothing that a row can hold:
    see `outcome_of`."""

    def run(chains: Sequence[Chain], seen: Progress) -> Iterator[tuple[Cell, Outcome, bool]]:
        for chain in chains:
            while True:
                known, cell = until_unknown(chain)
                yield from known
                if cell is None:
                    break
                seen.begin(cell)
                outcome = cell.row | dict(measure(cell))
                chain.finished(outcome)
                yield cell, outcome, True

    return run


def until_unknown(chain: Chain) -> tuple[list[tuple[Cell, Outcome, bool]], Cell | None]:
    """Outcomes that need no work, and then the next cell to run, if there is one."""
    known: list[tuple[Cell, Outcome, bool]] = []
    while (taken := chain.take()) is not None:
        cell, outcome = taken
        if outcome is None:
            return known, cell
        known.append((cell, outcome, False))
    return known, None
