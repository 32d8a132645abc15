"""What a person sees while a comparison runs: a bar where there is a terminal, else one line per cell; on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from manyheads.runs.cells import Cell

# What a cell costs, above 0.
Weigh = Callable[[Cell], float]


class Estimate:
    """Time left, from what cells took that were done: of the same task, or with the same length, where there are.

    weigh: what a cell costs, in any unit (tokens, say). With it a cell takes what its like took by weight, and a cell
    whose like has not been measured what all took; without it each takes the mean of its like."""

    def __init__(self, weigh: Weigh | None = None) -> None:
        self._weigh = weigh
        self._taken: dict[tuple[Any, ...], tuple[float, float]] = {}

    def learn(self, cell: Cell, seconds: float) -> None:
        for group in self._groups(cell):
            taken, weight = self._taken.get(group, (0.0, 0.0))
            self._taken[group] = taken + seconds, weight + self._weight(cell)

    def left(self, cells: Iterable[Cell], at_once: int = 1) -> tuple[float, int]:
        """Seconds for the cells whose like has been measured, and how many others there are."""
        total, unknown = 0.0, 0
        for cell in cells:
            known = next((self._taken[group] for group in self._groups(cell) if group in self._taken), None)
            if known is None:
                unknown += 1
            else:
                total += known[0] / known[1] * self._weight(cell)
        return total / at_once, unknown

    def _weight(self, cell: Cell) -> float:
        return 1.0 if self._weigh is None else self._weigh(cell)

    def _groups(self, cell: Cell) -> Sequence[tuple[Any, ...]]:
        """From the closest likeness to the widest. Weights make lengths and kinds comparable, seconds alone do not."""
        place = cell.place
        size = (cell.kind, place.get("task"), place.get("n"), place.get("context"))
        if self._weigh is not None:
            return (*size, cell.mechanism), (cell.kind, cell.mechanism), ()
        return (*size, cell.mechanism), size, (cell.kind,)


class Progress:
    """Told what happens to cells; tells a person. at_once: how many cells run at once. weigh: as Estimate's."""

    def __init__(
        self,
        cells: Sequence[Cell],
        *,
        console: Console | None = None,
        at_once: int = 1,
        weigh: Weigh | None = None,
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.at_once, self.total = at_once, len(cells)
        self._left = {id(cell): cell for cell in cells}
        self._estimate = Estimate(weigh)
        self._bar: Bar | None = None
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}  {task.description}"))
            self._bar = Bar(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=self.total, left="")
            self._bar.start()

    def known(self, cell: Cell, outcome: Mapping[str, Any]) -> None:
        """A cell that need not be run."""
        del self._left[id(cell)]
        if "seconds" in outcome:
            self._estimate.learn(cell, outcome["seconds"])
        self._draw()

    def begin(self, cell: Cell) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=escape(cell.title))
            self._draw()

    def end(self, cell: Cell, outcome: Mapping[str, Any]) -> None:
        del self._left[id(cell)]
        if "seconds" in outcome:
            self._estimate.learn(cell, outcome["seconds"])
        self._draw()
        if self._bar is None:
            number = self.total - len(self._left)
            left = f"; {self.time_left()}" if self._left else ""
            self.note(f"[{number}/{self.total}] {cell.title}: {self.told(outcome)}{left}")
        elif outcome["status"] == "failed":
            self.note(f"{cell.title}: {self.told(outcome)}")

    def told(self, outcome: Mapping[str, Any]) -> str:
        return told(outcome)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def time_left(self) -> str:
        seconds, unknown = self._estimate.left(self._left.values(), self.at_once)
        if unknown == len(self._left):
            return "time left not known yet"
        return f"{'over' if unknown else 'about'} {duration(seconds)} left"

    def _draw(self) -> None:
        if self._bar is not None:
            left = self.time_left() if self._left else ""
            self._bar.update(self._task, completed=self.total - len(self._left), left=left)


def told(outcome: Mapping[str, Any]) -> str:
    """The figure of an outcome in a few words."""
    if outcome["status"] != "done":
        return f"{outcome['status']}: {outcome['error']}"
    took = f" ({duration(outcome['seconds'])})" if "seconds" in outcome else ""
    if "value" in outcome:
        return f"{outcome['metric'].replace('_', ' ')} {outcome['value']:.4g} after {outcome['steps']} steps{took}"
    if "forward_s" in outcome:
        return f"forward {outcome['forward_s'] * 1e3:.3g} ms{took}"
    if "seconds_per_token" in outcome:
        return f"{outcome['seconds_per_token'] * 1e3:.3g} ms per token{took}"
    return f"peak {outcome['peak_bytes'] / 2**20:.3g} MiB{took}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
