"""Fair pairs: two sides in one process, in turns; ratios, medians, and the environment beside them."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_argument() -> str:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return str(parser.parse_args().device)


def keep_pages() -> None:
    """Keeps what is freed in the process: glibc gives large tensors back to the system, which then fills pages with
    zeros at every pass, from some length on; a light mechanism's time would be that."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def once(call: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds that one call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pair(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, rounds: int = 15, device: str = "cpu"
) -> dict[str, float]:
    """Runs both in turns. ratio: median of ours / theirs; below one means that ours is faster."""
    for call in (ours, theirs, ours, theirs):
        call()
    a, b = [], []
    for turn in range(rounds):
        # Who goes first changes, so that neither side always runs on a warmer cache.
        first = [(a, ours), (b, theirs)]
        for times, call in first if turn % 2 else reversed(first):
            times.append(once(call, device))
    return {
        "ours_ms": 1e3 * statistics.median(a),
        "theirs_ms": 1e3 * statistics.median(b),
        "ratio": statistics.median(x / y for x, y in zip(a, b, strict=True)),
    }


def peak_bytes(script: str, *arguments: str) -> int:
    """What a fresh process prints that runs `script` (Python source that calls peak_reset, then prints peak_since)."""
    # Left alone, glibc keeps some of what is freed: one pass of one module came out as 60 MB or as 68, by chance.
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, env=exact
    )
    return int(run.stdout.strip().splitlines()[-1])


def peak_reset() -> int:
    """Forgets the peak so far (Linux) and returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_since(baseline: int) -> int:
    """Bytes by which the peak since peak_reset exceeds the baseline that it returned."""
    return _status("VmHWM") - baseline


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def exponent(lengths: list[int], seconds: list[float]) -> float:
    """Slope of log time over log length, least squares."""
    x, y = torch.tensor(lengths).double().log(), torch.tensor(seconds).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def kept(name: str) -> list[dict[str, Any]]:
    """The rows of an earlier run, each with where it was measured: for a benchmark of which a part can be run by
    itself."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return []
    held = json.loads(path.read_text(encoding="utf-8"))
    return [{**_of(held["environment"]), **row} for row in held["rows"]]


def here() -> dict[str, Any]:
    """What a row says of where it was measured."""
    from manyheads.runs.environment import environment

    return _of(environment())


def _of(environment: dict[str, Any]) -> dict[str, Any]:
    return {key: environment[key] for key in ("commit", "cpu")}


def save(name: str, device: str, rows: list[dict[str, Any]], *, tell: bool = True) -> None:
    """Writes the results with the environment, and prints them (tell=False: one more row of a run that goes on)."""
    # Late: the rest of this file also serves where manyheads is not installed.
    from manyheads.runs.environment import environment

    for row in rows if tell else ():
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}.json" if device == "cpu" else f"{name}-{device}.json")
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    if tell:
        print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
