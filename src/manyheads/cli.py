"""The command line: what the catalogue says, the verbs, the server, and what is installed."""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

import typer
from rich.console import Console
from typer.core import TyperGroup

import manyheads
from manyheads.catalogue.command import AsJson, board, find, list_, print_json, show
from manyheads.runs.given import parse_json, shown

if TYPE_CHECKING:
    from manyheads.mechanism import Mechanism

# Where each verb is, and what the help says of it: the first sentence of its own, which a test holds it to.
VERBS = {
    "compare": ("compare.command:compare", "Compare mechanisms by quality, speed, memory and decode cost."),
    "heads": ("heads.command:heads", "Measure what every head does."),
    "shrink": ("shrink.command:shrink", "Shrink a model's KV cache, and tell what that saves and what it costs."),
    "convert": ("convert.command:convert", "Change a checkpoint's attention, and tell what that cost."),
    "explain": (
        "explain.command:explain",
        "Show what every head does: `explain MODEL --text ...`, or `explain study NAME`.",
    ),
    "steer": (
        "steer.command:steer",
        "Change what a trained model attends to, and see: `steer MODEL --with NAME --text ...`, or `steer list`.",
    ),
    "plan": (
        "parallel.command:plan",
        "Say which scheme spreads one sequence over processes, and what it costs: bytes sent and held, FLOPs.",
    ),
    "serve": (
        "serve.command:serve",
        "Open a small web app on this machine: type a text, explain it, intervene and see the change, browse reports.",
    ),
}


class Late(TyperGroup):
    """Imports a verb when it is run: what lists the catalogue does not wait for torch."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in VERBS:
            self.commands[args[0]] = verb(args[0])
        return super().resolve_command(ctx, args)


@cache
def verb(name: str) -> Any:
    """The command, with all its options."""
    module, _, attribute = VERBS[name][0].partition(":")
    found = getattr(importlib.import_module(f"manyheads.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False)
        alone.command(name)(found)
        found = alone
    command = typer.main.get_command(found)
    command.name = name
    return command


app = typer.Typer(
    cls=Late, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=manyheads.__doc__
)
app.command("list")(list_)
app.command()(show)
app.command()(find)
app.command()(board)


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="A mechanism's name, or package.module:Class.")],
    pattern: Annotated[list[str] | None, typer.Option(help="Only this pattern; may be repeated.")] = None,
    property_: Annotated[list[str] | None, typer.Option("--property", help="Only this property.")] = None,
    config: Annotated[str, typer.Option(help="Constructor arguments as JSON.")] = "{}",
    as_json: AsJson = False,
) -> None:
    """Prove a mechanism: run every property of the contract and say which hold. Exit code 1 where one fails."""
    from manyheads.testing import examine_mechanism

    cls, settings = find_class(target), _json_object(config)
    if settings:
        _check_taken(cls, settings)
    findings = []
    console = Console(highlight=False, soft_wrap=True)
    for finding in examine_mechanism(cls, patterns=pattern, properties=property_, config=settings):
        findings.append(finding)
        if not as_json:
            mark = "[green]holds[/green]" if finding.holds else "[red]FAILS[/red]"
            console.print(f"{mark}  {finding.pattern:<15} {finding.property:<16} {finding.claim}")
            if not finding.holds:
                console.print(f"       smallest failing input: {finding.message}", markup=False)
    failed = [f for f in findings if not f.holds]
    if as_json:
        print_json([vars(f) for f in findings])
    else:
        console.print(f"{cls.card.name}: {len(findings) - len(failed)} of {len(findings)} properties hold")
    if failed or not findings:
        raise typer.Exit(1)


def _json_object(text: str) -> dict[str, Any]:
    value = parse_json(text, f"--config {shown(text)}")
    if not isinstance(value, dict):
        raise ValueError(f"--config {shown(text)} is not a JSON object; want one such as '{{\"window\": 64}}'")
    return value


def _check_taken(cls: type[Mechanism], settings: dict[str, Any]) -> None:
    """ValueError where the mechanism takes the settings in no pattern: no property then tells of anything else."""
    from manyheads.testing.case import Case

    refused = []
    for pattern in sorted(cls.card.patterns):
        try:
            Case(cls, pattern, settings).unfed()
        except (TypeError, ValueError) as error:
            refused.append(error)
        else:
            return
    raise ValueError(f"--config: {refused[0]}") from refused[0]


def find_class(target: str) -> type[Mechanism]:
    """The class behind a registered name or `package.module:Class`, seen from the current folder."""
    from manyheads.registry import mechanism_class

    if ":" not in target:
        return mechanism_class(target)
    module_name, _, class_name = target.partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", module_name):
        raise ValueError(f"{target!r}: want package.module:Class (an importable module, no path)")
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r}: {error}; run from the folder that holds it") from None
    except (Exception, SystemExit) as error:  # whatever a module of somebody else does when it is imported
        raise ValueError(f"cannot import {module_name!r}: it raises {error!r}; mend that first") from error
    found = getattr(module, class_name, None)
    if not _is_mechanism(found):
        names = [n for n, v in vars(module).items() if _is_mechanism(v)]
        raise ValueError(f"{module_name} has no mechanism {class_name!r}; it has {names}")
    return found


def _is_mechanism(found: Any) -> TypeGuard[type[Mechanism]]:
    from manyheads.mechanism import Mechanism

    return isinstance(found, type) and issubclass(found, Mechanism) and hasattr(found, "card")


for _name, (_, _help) in VERBS.items():  # for the help, and for what a misspelt word may mean
    app.command(_name, help=_help)(lambda: None)


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, devices and which fast paths are available here."""
    from manyheads.runs.environment import environment, fast_paths

    if as_json:
        return print_json({"environment": environment(), "fast_paths": fast_paths()})
    console = Console(highlight=False, soft_wrap=True)
    for title, facts in (("environment", environment()), ("fast paths", fast_paths())):
        console.print(f"[bold]{title}[/bold]")
        for key, value in facts.items():
            console.print(f"  {key:<34} {value}", markup=False)
    return None


# Set, it shows where an error was raised, of whatever kind it is.
TRACEBACK = "MANYHEADS_TRACEBACK"
_INTERRUPTED = 130
_BUG = 70  # EX_SOFTWARE of sysexits.h
_MOST_SAID = 2000


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. What went wrong is told in one line on stderr: exit code 2 for what a user can mend, 70
    for a bug."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of another alphabet: a sign of it is spelled out
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(arguments, prog_name="manyheads", standalone_mode=False)
        if code == _INTERRUPTED:  # typer has caught it, and says nothing
            _told("interrupted", code)
    except KeyboardInterrupt:
        code = _told("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        # Who read the output has seen enough; what is still in it must not be tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if os.environ.get(TRACEBACK):
            typer.echo(_printable(traceback.format_exc()), err=True)
        code = _told(*_explained(error))
    sys.exit(code or 0)


def _explained(error: Exception) -> tuple[str, int]:
    """What to say of an error that ended a command, and the exit code."""
    if hasattr(error, "format_message"):  # of the parser of command lines
        parsed: Any = error
        if not str(error):  # nothing was given: it shows the help
            parsed.show()
            raise SystemExit(2)
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "manyheads"
        return f"{parsed.format_message()} See `{where} --help`.", parsed.exit_code
    if hasattr(error, "exit_code"):
        return str(error) or "ended", error.exit_code
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__, 2
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "manyheads").split(".")[0]) != "manyheads":
        return f"{package} is not installed: `pip install .` in the checkout of manyheads brings what it needs", 2
    if _memory_ran_out(error):
        return f"there is not enough memory ({error or 'MemoryError'}): give something smaller, or a larger machine", 2
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(Path(frame.filename).parts[-2:])
    return (
        f"this is a bug ({type(error).__name__}: {error}, in {place}:{frame.lineno}): run it again with {TRACEBACK}=1 "
        "in the environment, and report what that shows"
    ), _BUG


def _memory_ran_out(error: Exception) -> bool:
    """torch raises a plain RuntimeError where a CPU has no more."""
    import torch

    plain = isinstance(error, RuntimeError) and "not enough memory" in str(error)
    return plain or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _told(text: str, code: int) -> int:
    """One line, whatever the text holds: several become one, and what would steer a terminal is spelled out."""
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    line = line if len(line) <= _MOST_SAID else line[: _MOST_SAID - 3] + "..."
    typer.echo(_printable(f"manyheads: {line}"), err=True)
    return code


def _printable(text: str) -> str:
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
