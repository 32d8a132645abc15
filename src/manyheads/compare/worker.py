"""Runs one cell, here, in a process of its own, or on another machine; whatever happens becomes a row."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import manyheads

from .measure import measure_decode, measure_memory, measure_speed, peak_memory
from .train import train_cell

_one_at_a_time = threading.Lock()  # random state and the clock are shared by all threads of a process
_RUNNERS = {"quality": train_cell, "speed": measure_speed, "memory": measure_memory, "decode": measure_decode}


def run_cell(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome of one cell: its measured columns with `status`, `error` and `seconds`. Raises nothing but
    KeyboardInterrupt and its like."""
    with _one_at_a_time:
        began = time.perf_counter()
        outcome: dict[str, Any] = {"status": "done", "error": None}
        try:
            with memory_bounded():
                outcome |= _RUNNERS[kind](settings)
        except Exception as error:
            outcome |= failure(error)
        return outcome | {"seconds": time.perf_counter() - began, "machine": machine()}


def failure(error: Exception) -> dict[str, Any]:
    """An exception as columns of a failed row; with `stop` where more of the same would only fail again."""
    message = next((line for line in str(error).splitlines() if line.strip()), "no message")
    trace = "".join(traceback.format_exception(error)[-4:])
    row = {"status": "failed", "error": f"{type(error).__name__}: {message}", "traceback": trace}
    memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)
    return row | ({"stop": "there was not enough memory at the length before"} if memory else {})


def machine() -> dict[str, Any]:
    """What a measured figure depends on, in short."""
    cuda = torch.cuda.is_available()
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else "",
        "torch": torch.__version__,
    }


def version() -> str:
    return manyheads.__version__


@contextmanager
def memory_bounded() -> Iterator[None]:
    """Makes too large an allocation an error that can be caught: otherwise Linux kills the whole process for it."""
    available = _available_bytes()
    if available is None or torch.cuda.is_initialized():
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    wanted = held + int(0.9 * available)
    if before != resource.RLIM_INFINITY:
        wanted = min(wanted, before)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def _available_bytes() -> int | None:
    """Memory that this process may still take; None where that cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    if limit == "max" or free is None:
        return free
    return min(free, max(0, int(limit) - used))


def main() -> None:
    """A fresh process for one peak: settings as JSON on stdin, the outcome as JSON on the last line of stdout."""
    settings = json.loads(sys.stdin.read())
    try:
        with memory_bounded():
            outcome = peak_memory(settings)
    except Exception as error:
        outcome = failure(error)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
