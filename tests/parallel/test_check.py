"""The command that shows that all schemes agree, under torchrun and without."""

import os
import subprocess
import sys

from manyheads.parallel import check


def run(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=100)


def test_two_processes_under_torchrun() -> None:
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "manyheads.parallel.check")
    assert done.returncode == 0, done.stderr
    title, _, *lines = done.stdout.splitlines()
    assert title.startswith("2 processes, 1537 tokens, 4 heads of 32, gloo")
    assert len(lines) == len(check.schemes(4))
    assert all(line.endswith("equal") for line in lines)
