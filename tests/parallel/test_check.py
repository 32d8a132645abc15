"""The command that shows that all schemes agree, under torchrun and without."""

import os
import subprocess
import sys

import pytest

from manyheads.parallel import check


def run(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=100)


def test_two_processes_under_torchrun() -> None:
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "manyheads.parallel.check")
    assert done.returncode == 0, done.stderr
    title, _, *lines = done.stdout.splitlines()
    assert title.startswith("processes: 2, each on ")
    assert len(lines) == len(check.schemes(4))
    assert all(line.endswith("equal") for line in lines)


def test_alone_and_where_one_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "LENGTH", 40)
    calls = []

    def drifts(q, k, v, layout):
        calls.append(layout)
        return q + k + v + len(calls)

    monkeypatch.setattr(check, "schemes", lambda heads: [check.Scheme("drifts", "zigzag", drifts)])
    assert check.main() == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("DIFFERS")
