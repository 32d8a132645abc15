"""Forked programs are like those that a new interpreter runs, as far as tests rely on it."""

import os
import signal
from pathlib import Path

import pytest
import torch
from forked import Program, run


def test_a_program_has_its_own_words_and_streams() -> None:
    code = (
        "import os, sys; print(sys.argv[1:], os.environ.get('MINE'), os.environ.get('HOME'), os.getcwd());"
        "print('said', file=sys.stderr); sys.exit(3)"
    )
    done = run("-c", code, "a b", Path("c"), env={"MINE": "x"})
    assert (done.returncode, done.stdout, done.stderr) == (3, f"['a b', 'c'] x None {Path.cwd()}\n", "said\n")


@pytest.mark.parametrize(
    ("code", "ended", "words"),
    [
        ("raise ValueError('no')", 1, "ValueError: no\n"),
        ("raise SystemExit('why')", 1, "why\n"),
        ("import os; os._exit(9)", 9, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit, sys; atexit.register(print, 'late', file=sys.stderr)", 0, "late\n"),
        ("import threading as t, time, sys; t.Thread(target=lambda: (time.sleep(0.1), sys.exit(2))).start()", 0, ""),
        ("import subprocess as s, sys; sys.exit(s.run(['sh', '-c', 'exit 6']).returncode)", 6, ""),
    ],
)
def test_how_programs_end(code: str, ended: int, words: str) -> None:
    done = run("-c", code)
    assert done.returncode == ended
    assert done.stderr.endswith(words)
    assert bool(done.stderr) == bool(words)


def test_what_tests_set_is_not_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyheads.__version__", "mine")
    code = (
        "import manyheads, torch, warnings; warnings.warn('told'); print(manyheads.__version__, torch.rand(1).item())"
    )
    done = run("-c", code)
    assert "UserWarning: told" in done.stderr
    first = torch.rand(1, generator=torch.Generator().manual_seed(torch.Generator().initial_seed())).item()
    version, drawn = done.stdout.split()
    assert version != "mine"
    assert float(drawn) == first


def test_ctrl_c_reaches_a_program() -> None:
    code = "import time\ntry:\n  print('ready', flush=True); time.sleep(99)\nexcept KeyboardInterrupt: exit(5)"
    ours, theirs = os.pipe()
    with os.fdopen(ours) as told:
        program = Program("-c", code, stdout=theirs)
        os.close(theirs)
        assert told.readline() == "ready\n"
        assert program.poll() is None
        program.send_signal(signal.SIGINT)
        assert program.wait() == 5


def test_one_that_does_not_end_is_ended() -> None:
    program = Program("-c", "import time; time.sleep(99)")
    with pytest.raises(TimeoutError, match=r"over 0\.2 s"):
        program.wait(0.2)
    assert program.wait() == -signal.SIGKILL
