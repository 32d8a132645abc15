"""Work for the model: one piece at a time, a few waiting, the last ones kept."""

from __future__ import annotations

import re
import secrets
import sys
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MOST_WAITING = 8
MOST_KEPT = 16
MOST_PAGES = 128 * 2**20  # bytes
# Called with what is done and what share of the whole that is; raises where the job is no longer wanted.
Tell = Callable[[str, float], None]
# -> what is told as JSON, and a page to show, if there is one.
Work = Callable[[Tell], tuple[dict[str, Any], str | None]]


class Full(Exception):
    pass


class Cancelled(Exception):
    pass


@dataclass
class Job:
    """state: waiting, running, done, failed or cancelled."""

    work: Work | None = field(repr=False)
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    state: str = "waiting"
    step: str = ""
    share: float = 0.0
    error: str | None = None
    result: dict[str, Any] | None = None
    page: bytes | None = field(default=None, repr=False)
    unwanted: bool = False

    def told(self) -> dict[str, Any]:
        keys = ("id", "state", "step", "share", "error", "result")
        return {key: getattr(self, key) for key in keys} | {"page": self.page is not None}

    def run(self) -> None:
        def tell(step: str, share: float) -> None:
            if self.unwanted:
                raise Cancelled
            self.step, self.share = step, share

        assert self.work is not None
        try:
            tell("starting", 0.0)
            self.result, page = self.work(tell)
            self.page = None if page is None else page.encode()
            self.step, self.share, self.state = "done", 1.0, "done"
        except Cancelled:
            self.state = "cancelled"
        except ValueError as error:
            self.error, self.state = said(error), "failed"
        except Exception as error:
            # The terminal gets the whole of it, whoever asks gets its kind.
            traceback.print_exc(file=sys.stderr)
            short = isinstance(error, MemoryError) or "out of memory" in str(error)
            why = "the memory does not suffice: give a shorter text" if short else "the terminal shows why"
            self.error = f"the model could not do this ({type(error).__name__}): {why}"
            self.state = "failed"
        finally:
            self.work = None


def said(error: ValueError) -> str:
    """An error of the library in the words of the app, where options are fields."""
    return re.sub(r"(?<!\S)--(?=[a-z])", "", str(error))


class Jobs:
    """A queue and the thread that empties it. The thread starts with the first job and never keeps a program alive."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Job] = OrderedDict()
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, work: Work) -> Job:
        with self._change:
            if self._closed or len(self._waiting) >= MOST_WAITING:
                raise Full
            job = Job(work)
            self._waiting.append(job)
            self._kept[job.id] = job
            self._forget()
            if self._thread is None:
                self._thread = threading.Thread(target=self._empty, daemon=True, name="manyheads-model")
                self._thread.start()
            self._change.notify()
        return job

    def get(self, name: str) -> Job | None:
        with self._change:
            return self._kept.get(name)

    def ahead(self, job: Job) -> int:
        """How many are before this one."""
        with self._change:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    def cancel(self, job: Job) -> None:
        """One that waits goes at once; one that runs, at its next step."""
        with self._change:
            job.unwanted = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.state, job.work = "cancelled", None

    def close(self, seconds: float) -> bool:
        """Ends all of it; whether the thread has ended within that time."""
        with self._change:
            self._closed = True
            for job in self._kept.values():
                job.unwanted = True
            self._waiting.clear()
            self._change.notify()
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _empty(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                job = self._waiting.popleft()
                job.state = "running"
            job.run()
            with self._change:
                self._forget()

    def _forget(self) -> None:
        """The oldest that have ended go, beyond what is kept."""
        ended = [job for job in self._kept.values() if job.state not in ("waiting", "running")]
        room = sum(len(job.page or b"") for job in ended)
        while ended and (len(self._kept) > MOST_KEPT or (room > MOST_PAGES and len(ended) > 1)):
            oldest = ended.pop(0)
            room -= len(oldest.page or b"")
            del self._kept[oldest.id]
