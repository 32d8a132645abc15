"""What measurements share: progress on stderr, frozen weights, and another try with less when memory is short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from manyheads.runs.progress import duration

# Seconds between lines where there is no terminal to draw a bar on.
_EVERY = 10.0
# Told (steps done, steps, what there is to say).
Tell = Callable[[int, int, str], None]


def silent(done: int, total: int, text: str = "") -> None:
    """A Tell for those who do not look."""


class Progress:
    """One measure after another, with the time left of each: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.console, self.clock = console or Console(stderr=True, highlight=False), clock

    @contextmanager
    def measure(self, name: str, work: Sequence[float] = ()) -> Iterator[Tell]:
        """work: what each step costs, in any unit (its tokens, say); all alike without it."""
        begun = said = self.clock()
        first = 0
        bar = None
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
            )
            bar = Bar(*columns, console=self.console, transient=True)
            task = bar.add_task(name, total=None, left="")
            bar.start()

        def tell(done: int, total: int, text: str = "") -> None:
            nonlocal said, first, begun
            now = self.clock()
            if done and not first:
                # The first step warms up, and a resumed run has steps that took no time now.
                first, begun = done, now
            each = list(work) if len(work) == total else [1.0] * total
            left = ""
            if done > first:
                rest = (now - begun) / sum(each[first:done]) * sum(each[done:])
                left = f"about {duration(rest)} left"
            said_here = "; ".join(part for part in (text, left) if part)
            if bar is not None:
                bar.update(task, completed=done, total=total, left=said_here)
            elif now - said > _EVERY and done < total:
                said = now
                self.note(f"{name} {done}/{total}: {said_here}")

        start = self.clock()
        try:
            yield tell
        finally:
            if bar is not None:
                bar.stop()
        self.note(f"{name}: measured in {duration(self.clock() - start)}")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
