"""Peaks of memory, and another try with less where it is short."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import torch


def trim_memory() -> None:
    """Freed memory goes back to the system, and counts when it is taken again."""
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


class Meter(Protocol):
    """baseline: bytes held when the meter was made; peak(): bytes above that since then."""

    baseline: int

    def peak(self) -> int: ...


def memory_meter(device: torch.device) -> Meter:
    return _CudaMeter() if device.type == "cuda" else _ProcessMeter()


class _CudaMeter:
    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.baseline = torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.baseline


class _ProcessMeter:
    """The high-water mark of this process: on Linux set back to what is resident now, elsewhere as it stands."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.baseline = _status("VmRSS")
        except OSError:
            self.baseline = self._high()

    def peak(self) -> int:
        return max(0, self._high() - self.baseline)

    @staticmethod
    def _high() -> int:
        try:
            return _status("VmHWM")
        except OSError:
            import resource  # not on Windows

            highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return highest if sys.platform == "darwin" else highest * 1024


def _status(key: str) -> int:
    """Bytes in a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


T = TypeVar("T")


_SHORTEST = 64


def within_memory(measure: Callable[[int], T], length: int, note: Callable[[str], None] | None = None) -> tuple[T, int]:
    """measure(length), or with half the length as often as memory runs out; and the length that it took."""
    while True:
        try:
            return measure(length), length
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if length // 2 < _SHORTEST:
            raise ValueError(
                f"out of memory even with {length} tokens: load the model in bfloat16 or measure on a larger machine"
            )
        length //= 2
        if note is not None:
            note(f"out of memory: again with {length} tokens")


def is_shortage(error: BaseException) -> bool:
    """Whether this says that memory ran out, in whatever words and class."""
    text = str(error)
    known = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text.lower() for words in known)
