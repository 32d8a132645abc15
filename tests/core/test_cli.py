"""The commands as a user types them."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from manyheads import list_attentions
from manyheads.catalogue.facts import example_code
from manyheads.cli import VERBS, app, main, verb
from manyheads.registry import mechanism_class


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_list_names_every_mechanism(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == list_attentions()
    code, out, _ = run(capsys, "list", "--family", "plain")
    assert code == 0
    assert "softmax" in out
    assert "gqa" not in out


@pytest.mark.parametrize("name", list_attentions())
def test_show_and_its_example_run(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run(capsys, "show", name)
    assert code == 0
    assert mechanism_class(name).card.title in out
    exec(example_code(mechanism_class(name)), {})
    assert "torch.Size" in capsys.readouterr().out


def test_check_names_a_leak(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent / "conformance")
    code, out, _ = run(capsys, "check", "test_planted_bugs:OffByOne", "--property", "no-future")
    assert code == 1
    assert "FAILS" in out
    assert "leak from the future" in out
    assert "smallest failing input: n=2" in out
    code, out, _ = run(capsys, "check", "test_planted_bugs:Healthy", "--property", "no-future", "--json")
    assert code == 0
    assert [f["holds"] for f in json.loads(out)] == [True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "sofmax"], "did you mean 'softmax'"),
        (["list", "--pattern", "causal"], "want one of"),
        (["check", "no_such_module:Thing"], "cannot import 'no_such_module'"),
        (["check", "json:JSONDecoder"], "has no mechanism 'JSONDecoder'"),
        (["check", "../evil:Thing"], "want package.module:Class"),
        (["check", "softmax", "--config", "{"], "is not JSON"),
        (["check", "gqa", "--config", '{"kv_heads": 3}'], "--config: gqa: heads=4 is not a multiple of kv_heads=3"),
        (["check", "softmax", "--property", "nope"], "unknown properties"),
        (["chek"], "No such command"),
    ],
)
def test_errors_end_with_two_and_no_traceback(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert {"torch", "device", "threads"} <= set(facts["environment"])
    assert "torch.compile" in facts["fast_paths"]


def test_the_commands_are_these() -> None:
    names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    verbs = {"compare", "convert", "explain", "heads", "shrink", "steer", "plan", "serve"}
    assert names == {"list", "show", "find", "board", "check", "info"} | verbs
    for name, (_, told) in VERBS.items():
        assert told in verb(name).get_short_help_str(limit=1000)


def test_no_command_line_waits_for_torch() -> None:
    """It takes longer to import than `list` may take: a verb reads it when it runs."""
    heavy = (
        "[name for name in ('torch', 'transformers', 'altair', 'sklearn', 'scipy', 'captum') if name in sys.modules]"
    )
    run = [sys.executable, "-c", f"import sys, manyheads.cli; print({heavy})"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_help_shows_all_that_was_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in a help text are markup to the library that prints it, which then leaves them out."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    written = 0
    for name, command in {name: verb(name) for name in VERBS}.items():
        for part in (command, *getattr(command, "commands", {}).values()):
            with suppress(SystemExit):
                part(["--help"], prog_name=name)
            shown = re.sub(r"[\s│]+", "", capsys.readouterr().out)
            for option in part.params:
                said = re.sub(r"\s+", "", getattr(option, "help", None) or "")
                if "[" in said:
                    written += 1
                    assert said.replace("\\[", "[") in shown
    assert written
