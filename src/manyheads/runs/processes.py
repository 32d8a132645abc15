"""A cell over several processes of this machine, as `torchrun` starts them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_PATIENCE = timedelta(minutes=10)


def in_processes(count: int, function: str, *arguments: Any) -> dict[str, Any]:
    """function(*arguments) in `count` processes of one torch.distributed group, all of which run it; what the first
    gives.

    function: as "package.module:name"; it spreads its work itself. arguments and what comes back: JSON values. Gloo,
    over the loopback unless GLOO_SOCKET_IFNAME says otherwise, or NCCL where there is a GPU for each. RuntimeError with
    the last words of a process where one failed.
    """
    with TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job", Path(folder) / "answer"
        job.write_text(json.dumps({"function": function, "arguments": arguments}), encoding="utf-8")
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, "-m", *start, "-m", "manyheads.runs.processes", str(job), str(answer)]
        code, lines = _run(command)
        if code or not answer.is_file():
            words = [line for line in lines if "Error" in line] or lines or ["no words"]
            raise RuntimeError(f"{count} processes ended with {code}: {words[-1]}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _run(command: list[str]) -> tuple[int, list[str]]:
    """The exit code, and what was said on stderr."""
    quiet, heard = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, text=True, env=os.environ | _told(), stdout=quiet, stderr=heard) as started:
        try:
            _, told = started.communicate()
        except BaseException:
            started.terminate()  # killed outright it would leave those that it started behind
            raise
    return started.returncode, told.splitlines()


def _told() -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # fmt: skip


def main() -> None:
    """In each of the processes: the file of the job, and that of the answer."""
    import torch
    import torch.distributed as dist

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    module, _, name = job["function"].partition(":")
    local, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count() >= size
    if gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=_PATIENCE)
    try:
        outcome = getattr(importlib.import_module(module), name)(*job["arguments"])
        if dist.get_rank() == 0:
            Path(sys.argv[2]).write_text(json.dumps(outcome), encoding="utf-8")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
