"""Every command, for every odd input, ends in one line that says what is wrong; within bounded time and memory."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import forked
import pytest
from scale import SEED, TIMES

from manyheads.cli import main

HERE = Path(__file__).parent
COUNT = 100 * TIMES


@pytest.mark.slow  # a hundred command lines, some of which load models
def test_odd_lines_end_well(tmp_path: Path) -> None:
    ran = forked.run(HERE / "run_lines.py", tmp_path, COUNT, SEED)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ended = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(ended) == COUNT
    wrong = [own for own in ended if own["end"] not in ("reached", 0, 1, 2)]
    unsaid = [
        own for own in ended if own["end"] == 2 and own["arguments"] and not own["said"].startswith("manyheads: ")
    ]
    assert not wrong + unsaid, "\n\n".join(f"{o['arguments']}\n{o['end']}: {o['more']}" for o in wrong + unsaid)
    assert sum(own["end"] == 2 for own in ended) > len(ended) // 2


def said(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyError("x"), 70, "this is a bug (KeyError: 'x', in odd/test_command_lines.py:"),
        (RuntimeError("first\nsecond"), 70, "first; second"),
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), 2, "give something smaller"),
        (ValueError("a\n\n  b\x1b[2J\ud800\u202e"), 2, "a; b\\x1b[2J\\ud800\\u202e"),
        (ValueError("x" * 10**6), 2, "xxx..."),
        (ValueError(), 2, "ValueError"),
    ],
)  # fmt: skip
def test_whatever_is_raised_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    def raising(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("manyheads.catalogue.command.names", raising)
    found, err = said(capsys, ["list"])
    assert (found, err.count("\n")) == (code, 1)
    assert err.startswith("manyheads: ")
    assert words in err
    assert len(err) < 2100
    monkeypatch.setenv("MANYHEADS_TRACEBACK", "1")
    assert "Traceback" in said(capsys, ["list"])[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chek"], "See `manyheads --help`."),
        (["heads", "--length", "x"], "See `manyheads heads --help`."),
        (["explain", "--text", "x", "--layers", "0-99999999"], "--layers '0-99999999'"),
        (["explain", "--text", "x", "--layers", "²"], "--layers '²'"),
        (["compare", "--seeds", "999999999"], "at most 10,000"),
        (["compare", "moba[block=" + "[" * 9000 + "]"], "nested deeper than 32"),
        (["compare", "moba[block=1,block=2]"], "'block' is there twice"),
        (["check", "softmax", "--pattern", "x"], "declares no pattern 'x'"),
        (["check", "softmax", "--config", "[" * 100_000], "is nested too deep"),
        (["heads", "x" * 5000], "File name too long"),
        (["check", "manyheads:Mechanism"], "has no mechanism 'Mechanism'"),
    ],
)
def test_one_line_says_what_to_do(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    code, err = said(capsys, arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


def test_nothing_given_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    told = capsys.readouterr()
    assert stopped.value.code == 2
    assert "compare" in told.out + told.err


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m manyheads show softmax | head -c 1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ran.stderr == ""


@pytest.mark.parametrize("arguments", [["list"], ["find", "duo attention"]])
def test_a_terminal_of_another_alphabet_gets_all_the_rest(arguments: list[str]) -> None:
    """As LC_ALL=C without coercion, and a code page of Windows: nothing is said of an encoding."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "manyheads", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout) > 300


def test_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, body in {"broken": "x = (", "leaves": "raise SystemExit(3)", "divides": "1 / 0"}.items():
        (tmp_path / f"{name}_module.py").write_text(body)
        code, err = said(capsys, ["check", f"{name}_module:X"])
        assert (code, err.count("\n")) == (2, 1)
        assert f"cannot import '{name}_module'" in err


@pytest.mark.parametrize(
    "line", ["explain NO --text x", "steer NO --with boost --text x", "heads NO", "shrink NO", "convert NO"]
)
def test_a_target_that_takes_nothing_is_told_before_the_work(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not behind it, when what took an hour has no place to go: before a model that is not there is looked for."""
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "within"):
        code, err = said(capsys, [*line.replace("NO", str(tmp_path / "no_model")).split(), "--out", str(target)])
        assert (code, err.count("\n")) == (2, 1)
        assert str(target) in err
        assert "is a file: give a folder" in err


def test_the_board_is_a_page_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "such as" in said(capsys, ["board", "--out", str(tmp_path)])[1]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "manyheads: interrupted\n"),
        (ModuleNotFoundError("No module named 'sklearn.x'", name="sklearn.x"), 2, "sklearn is not installed: `pip"),
        (ModuleNotFoundError("No module named 'manyheads.x'", name="manyheads.x"), 70, "this is a bug"),
    ],
)
def test_what_stopped_it_is_said(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    words: str,
) -> None:
    def raising(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("manyheads.catalogue.command.names", raising)
    found, err = said(capsys, ["list"])
    assert found == code
    assert words in err
