"""Whatever happens in a cell becomes a row."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


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


def outcome_of(measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """measure()'s columns with `status`, `error`, `seconds` and `machine`. Raises nothing but KeyboardInterrupt and its
    like: a cell that diverges or runs out of memory leaves the others alone."""
    began = time.perf_counter()
    outcome: dict[str, Any] = {"status": "done", "error": None}
    try:
        with memory_bounded():
            outcome |= measure()
    except Exception as error:
        outcome |= failure(error)
    return outcome | {"seconds": time.perf_counter() - began, "machine": machine()}
