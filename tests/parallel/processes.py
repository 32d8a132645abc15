"""Functions run in several processes at once, over loopback and with no port for the rendezvous."""

import contextlib
import importlib
import json
import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from manyheads.parallel import blocks, ring

# The last two are what the first backward pass and the first checkpoint import.
PRELOADED = [
    "manyheads.parallel",
    "manyheads.models.auto",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
]


def run_all(folder: Path, rank: int, size: int, modules: tuple[str, ...]) -> None:
    """In a process of its own: every function named in the modules' CASES, and what each raised, in a file."""
    begin(folder, rank, size)
    # Small tiles, so that short sequences have many, and heads that go round one by one. Of this process alone: others
    # run what users run.
    blocks.TILE, ring.UNDERWAY = 5, 1
    found = {}
    for module in modules:
        for name, case in importlib.import_module(module).CASES.items():
            try:
                case()
                found[f"{module}: {name}"] = ""
            except Exception:
                found[f"{module}: {name}"] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def begin(folder: Path, rank: int, size: int, patience: float = 20.0) -> None:
    """Joins the group of all processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=patience))


def processes(target, folder: Path, size: int, *args, seconds: float = 150.0) -> list[int]:
    """Exit codes of `size` processes that run target(folder, rank, size, *args); none outlives this call."""
    # Forked from one that has torch already: an import in each would take longer than all they do.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = [context.Process(target=target, args=(folder, rank, size, *args), daemon=True) for rank in range(size)]
    for process in started:
        process.start()
    end = time.monotonic() + seconds
    for process in started:
        process.join(max(0.1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def reports(folder: Path, size: int, *modules: str) -> list[dict[str, str]]:
    codes = processes(run_all, folder, size, modules)
    assert codes == [0] * size, f"exit codes {codes}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
