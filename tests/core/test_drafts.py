"""What a killed process leaves in a folder goes with the next run, and nobody else's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manyheads.runs import files
from manyheads.runs.store import Store

# The module alone: the package around it imports torch, which takes a hundred times as long.
KILLED = f"""
import os, sys
from pathlib import Path
sys.path.append({str(Path(files.__file__).parent)!r})
import files
os.replace = lambda *_: os.kill(os.getpid(), 9)
files.write_durably(Path(sys.argv[1]), b"half")
"""
WAITING = KILLED.replace("os.kill(os.getpid(), 9)", "(print('ready', flush=True), sys.stdin.read())")


def killed(path: Path) -> Path:
    assert subprocess.run([sys.executable, "-c", KILLED, path]).returncode == -9
    (draft,) = path.parent.glob(f".{path.name}.*.part")
    return draft


def test_drafts_of_the_dead_go_with_the_next_write(tmp_path: Path) -> None:
    drafts = [killed(tmp_path / name) for name in ("a.json", "b.json")]
    files.write_atomically(tmp_path / "c.json", "whole")
    assert not any(draft.exists() for draft in drafts)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_run_of_the_folder_clears_its_cells(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    draft = killed(tmp_path / "cells" / "0.json")
    with Store(tmp_path):
        assert not draft.exists()


def test_drafts_of_the_living_stay(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITING, tmp_path / "a.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (draft,) = tmp_path.glob(".a.json.*.part")
        # The same under a number that nobody has here, as another machine's process has it: its lock tells.
        far = tmp_path / ".a.json.4194999.part"
        os.link(draft, far)
        files.write_atomically(tmp_path / "c.json", "whole")
        assert draft.exists()
        assert far.exists()
        other.kill()
    files._swept.clear()
    files.write_atomically(tmp_path / "c.json", "whole")
    assert not draft.exists()
    assert not far.exists()


def test_what_is_no_draft_stays(tmp_path: Path) -> None:
    named = [".a.part", "a.json.4194999.part", ".a.json.x.part", ".4194999.part"]
    for name in named:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".linked.4194999.part").symlink_to(tmp_path / ".a.part")
    (tmp_path / ".folder.4194999.part").mkdir()
    files.write_atomically(tmp_path / "c.json", "whole")
    assert {*named, ".linked.4194999.part", ".folder.4194999.part", "c.json"} == {p.name for p in tmp_path.iterdir()}


def test_an_own_number_of_an_earlier_life_is_no_protection(tmp_path: Path) -> None:
    draft = tmp_path / f".a.json.{os.getpid()}.part"
    draft.write_text("left by a container that was started anew")
    files.write_atomically(tmp_path / "c.json", "whole")
    assert not draft.exists()


def test_a_write_that_fails_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_durably(tmp_path / "a.json", b"half")
    assert not list(tmp_path.iterdir())
