"""A folder is written whole or not at all, and what a killed process left is tidied by the next."""

import os
import signal
from pathlib import Path

import pytest

from manyheads.runs.files import whole_folder


def written(folder: Path, text: str) -> None:
    with whole_folder(folder) as draft:
        (draft / "weights").write_text(text)


def stopped(folder: Path, seen: list[str]) -> None:
    """Notes what stands there while it is written, and is stopped."""
    with whole_folder(folder) as draft:
        (draft / "weights").write_text("half")
        seen.append((folder / "weights").read_text())
        raise KeyboardInterrupt


def killed(folder: Path, monkeypatch: pytest.MonkeyPatch, *, between: bool) -> int:
    """The number of a process that was killed while it wrote the folder, or between its two renames."""
    child = os.fork()
    if child == 0:
        replace = os.replace

        def last(one: Path, other: Path) -> None:
            replace(one, other)
            os.kill(os.getpid(), signal.SIGKILL)

        if between:
            monkeypatch.setattr(os, "replace", last)
        with whole_folder(folder) as draft:
            (draft / "weights").write_text("half")
            if not between:
                os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return child


def test_it_takes_the_place_of_another(tmp_path: Path) -> None:
    for text in ("old", "new"):
        written(tmp_path / "out", text)
        assert (tmp_path / "out" / "weights").read_text() == text
    assert os.listdir(tmp_path) == ["out"]


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    written(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "out", [])
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("between", [False, True], ids=["writing", "between renames"])
def test_the_next_one_tidies_after_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: bool) -> None:
    out = tmp_path / "out"
    written(out, "old")
    process = killed(out, monkeypatch, between=between)
    assert (tmp_path / f".out.{process}.part").is_dir()
    assert out.exists() is not between
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        stopped(out, seen)
    assert seen == ["old"]  # put back before anything is written
    assert (out / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_folders_of_others_stay(tmp_path: Path) -> None:
    for name in (f".out.{os.getppid()}.part", ".other.999999999.part", ".out.part", "out.999999999.part"):
        (tmp_path / name).mkdir()
    before = set(os.listdir(tmp_path))
    written(tmp_path / "out", "new")
    assert set(os.listdir(tmp_path)) == before | {"out"}
