"""What stands where a conversion is to be written: models and texts that are read stay, and what was there before."""

import os
from pathlib import Path

import pytest

from manyheads.cli import main
from manyheads.convert.saving import check_target, drafted

FAST = ["--windows", "1", "--keys", "2", "--length", "160", "--align", "mean", "--calibrate", "320"]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """An older conversion, with a model and files of somebody's inside."""
    folder = tmp_path / "before"
    for name in ("conversion.json", "model.safetensors", "config.json", "inner/config.json", "text.txt", "scores.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["{}/inner"],
        ["{}/inner", "--stream", "--kv-heads", "1"],
        ["{}", "--stream", "--kv-heads", "1"],
        ["--text", "{}/text.txt"],
        ["--stream", "--to", "prune", "--heads", "16", "--scores", "{}/scores.json"],
        ["elsewhere", "{}", "--to", "bam"],
        ["--to", "distil", "--heal", "1k", "--against", "{}/inner"],
        ["{}", "--to", "distil", "--heal", "1k", "--against", "elsewhere"],
    ],
    ids=lambda given: " ".join(given),
)
def test_what_is_read_is_not_replaced(arguments: list[str], before: Path, capfd: pytest.CaptureFixture[str]) -> None:
    was = listing(before)
    with pytest.raises(SystemExit) as end:
        main(["convert", *(part.format(before) for part in arguments), "--out", str(before)])
    told = capfd.readouterr().err
    assert end.value.code == 2
    assert f"--out {before}" in told
    assert "give another one" in told
    assert listing(before) == was


def test_a_measurement_does_not_replace_the_record_of_weights(before: Path, capfd: pytest.CaptureFixture[str]) -> None:
    was = listing(before)
    for values in ("1", "2,1"):
        with pytest.raises(SystemExit) as end:
            main(["convert", "--kv-heads", values, "--dry-run", *FAST, "--out", str(before)])
        assert end.value.code == 2
        assert "whose record a measurement (--dry-run) would replace" in capfd.readouterr().err
    assert listing(before) == was
    check_target(before)  # another conversion may take its place


@pytest.mark.parametrize("error", [OSError(13, "no"), KeyboardInterrupt()], ids=["error", "stopped"])
def test_what_was_there_comes_back_where_the_new_cannot_take_its_place(
    error: BaseException, before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was, replace = listing(before), os.replace

    def fails(one: Path, other: Path) -> None:
        if Path(one).name == f".before.{os.getpid()}.part":
            raise error
        replace(one, other)

    monkeypatch.setattr(os, "replace", fails)

    def convert() -> None:
        with drafted(before, None):
            pass

    with pytest.raises((OSError, KeyboardInterrupt)):
        convert()
    assert listing(before) == was
    assert os.listdir(before.parent) == [before.name]


def test_a_link_to_a_folder_stays_and_its_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "folder")
    for text in ("one", "two"):
        with drafted(link, None) as draft:
            (draft / "conversion.json").write_text(text)
        assert link.is_symlink()
        assert (tmp_path / "disk" / "folder" / "conversion.json").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]
    assert os.listdir(tmp_path / "disk") == ["folder"]


def test_the_folder_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with drafted(Path("."), None) as draft:
        (draft / "conversion.json").write_text("all")
    assert listing(tmp_path) == {"here/conversion.json": b"all"}
