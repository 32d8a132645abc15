"""What a person sees while a comparison runs: a bar where there is a terminal, else one line per cell; on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from manyheads.runs.cells import Cell


class Estimate:
    """Time left, from what cells of the same kind took: of the same task, or with the same length, where there are."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Any, ...], list[float]] = {}

    def learn(self, cell: Cell, seconds: float) -> None:
        for group in self._groups(cell):
            self._seconds.setdefault(group, []).append(seconds)

    def left(self, cells: Iterable[Cell], at_once: int = 1) -> tuple[float, int]:
        """Seconds for the cells whose like has been measured, and how many others there are."""
        total, unknown = 0.0, 0
        for cell in cells:
            known = next((self._seconds[group] for group in self._groups(cell) if group in self._seconds), None)
            if known is None:
                unknown += 1
            else:
                total += mean(known)
        return total / at_once, unknown

    @staticmethod
    def _groups(cell: Cell) -> Sequence[tuple[Any, ...]]:
        """From the closest likeness to the widest."""
        place = cell.place
        size = (cell.kind, place.get("task"), place.get("n"), place.get("context"))
        return (*size, cell.mechanism), size, (cell.kind,)


class Progress:
    """Told what happens to cells; tells a person. at_once: how many cells run at the same time."""

    def __init__(self, cells: Sequence[Cell], *, console: Console | None = None, at_once: int = 1) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.at_once, self.total = at_once, len(cells)
        self._left = {id(cell): cell for cell in cells}
        self._estimate = Estimate()
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
