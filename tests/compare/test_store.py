"""The results folder: what goes in comes out, whatever breaks in between."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from forked import run

from manyheads.runs.cells import Cell
from manyheads.runs.store import Store

CELL = Cell("speed", "gqa", {"n": 8}, {"n": 8, "mechanism": {"name": "gqa"}}, "speed gqa")
OUTCOME = {**CELL.row, "status": "done", "error": None, "forward_s": 0.25}


def saved(folder: Path) -> Path:
    """The file of CELL in a fresh folder."""
    with Store(folder) as store:
        store.save_experiment({"seeds": [0]}, {"torch": "x"})
        store.save(CELL, OUTCOME)
    return folder / "cells" / f"{CELL.key}.json"


def test_round_trip(tmp_path: Path) -> None:
    path = saved(tmp_path / "a" / "b")
    with Store(tmp_path / "a" / "b") as store:
        assert store.load(CELL) == OUTCOME
        assert store.load(Cell("speed", "gqa", {"n": 9}, {"n": 9}, "")) is None
        assert store.warnings == []
    assert json.loads(path.read_text())["settings"] == CELL.settings
    left = sorted(p.name for p in (tmp_path / "a" / "b").rglob("*") if p.is_file())
    assert left == sorted([".lock", path.name, "experiment.json"])


def test_a_stored_cell_takes_the_label_of_today(tmp_path: Path) -> None:
    saved(tmp_path)
    renamed = Cell("speed", "gqa[x]", {"n": 8}, CELL.settings, "")
    with Store(tmp_path) as store:
        assert store.load(renamed) == OUTCOME | {"mechanism": "gqa[x]"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b"null", b'{"key": "other", "schema": 1, "cell": {"status": "done"}}'],
)
def test_a_broken_cell_is_run_again_with_a_warning(content: bytes, tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(content)
    with Store(tmp_path) as store:
        assert store.load(CELL) is None
        assert len(store.warnings) == 1
        assert str(path) in store.warnings[0]
        assert "run again" in store.warnings[0]
        store.save(CELL, OUTCOME)
        assert store.load(CELL) == OUTCOME


@pytest.mark.parametrize(("key", "value"), [("schema", 2), ("manyheads", "0.0.1")])
def test_a_folder_of_another_version(key: str, value: Any, tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    facts = json.loads((tmp_path / "experiment.json").read_text())
    (tmp_path / "experiment.json").write_text(json.dumps(facts | {key: value}))
    with pytest.raises(ValueError) as caught:
        Store(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert str(value) in str(caught.value)
    assert "choose another --out" in str(caught.value)
    assert path.read_bytes() == before


def test_a_broken_experiment_file_is_no_obstacle(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "experiment.json").write_text("{")
    with Store(tmp_path) as store:
        assert "written anew" in store.warnings[0]
        assert store.load(CELL) == OUTCOME


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file; want a folder"):
        Store(tmp_path / "out")
    with pytest.raises(ValueError, match="cannot make the results folder"):
        Store(tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "mine"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(ValueError, match="another comparison is running"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    code = f"import os; from manyheads.runs.store import Store; s = Store({str(tmp_path)!r}); os._exit(9)"
    assert run("-c", code).returncode == 9
    Store(tmp_path).close()


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    other = Cell("speed", "gqa", {"n": 16}, {"n": 16}, "")
    real = os.fsync

    def full_while_reserved(descriptor: int) -> None:
        """A disk on which nothing fits as long as the reserve is there."""
        if (tmp_path / "cells" / ".reserve").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with Store(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", full_while_reserved)
        with pytest.raises(OSError, match="make room, then run the same command again") as caught:
            store.save(other, OUTCOME | other.row)
        assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    with Store(tmp_path) as store:
        assert store.load(CELL) == OUTCOME
        assert store.load(other) == OUTCOME | other.row
    assert not list(tmp_path.rglob("*.part"))


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="the disk is full"):
        Store(tmp_path)
    monkeypatch.undo()
    Store(tmp_path).close()  # and the lock is free again


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Store(tmp_path) as store:
        monkeypatch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match="finished cells are kept"):
            store.save(CELL, OUTCOME | {"forward_s": 9.0})
    assert path.read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))
