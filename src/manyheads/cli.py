"""The command line: list, show, check, compare, heads, shrink, convert, explain, steer, serve, info."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import manyheads
from manyheads.compare.command import compare
from manyheads.convert.command import convert
from manyheads.explain.command import explain
from manyheads.heads.command import heads
from manyheads.mechanism import Mechanism
from manyheads.registry import list_attentions, mechanism_class
from manyheads.runs.given import parse_json, shown
from manyheads.serve.command import serve
from manyheads.shrink.command import shrink
from manyheads.softmax import changed_stages
from manyheads.steer.command import steer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=manyheads.__doc__)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _facts(name: str) -> dict[str, Any]:
    cls = mechanism_class(name)
    card = cls.card
    return {
        "name": card.name,
        "title": card.title,
        "reference": card.reference,
        "family": card.family.value,
        "patterns": sorted(card.patterns),
        "time": card.time,
        "state": card.state,
        "decodes": card.decodes,
        "takes": dict(card.takes),
        "resizes": card.resizes,
        "stages": changed_stages(cls),
        "notes": card.notes,
    }


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Only those that declare this pattern.")] = None,
    as_json: AsJson = False,
) -> None:
    """Name every mechanism, with its patterns and cost."""
    rows = [_facts(name) for name in list_attentions(family=family, pattern=pattern)]
    if as_json:
        return _print_json(rows)
    console = Console()
    wide = console.width >= 110  # in a pipe it is 80
    table = Table(title=f"{len(rows)} mechanisms", box=SIMPLE_HEAD, padding=(0, 1))
    for header in ("name", *(["family"] if wide else []), "self", "cross", "other"):
        table.add_column(header, no_wrap=True)
    for header in ("time", "state", *(["paper"] if wide else [])):
        table.add_column(header, no_wrap=header == "paper")
    for row in rows:
        costs = [row["time"], row["state"] if row["decodes"] else ""]
        names = [row["name"], *([row["family"]] if wide else []), *_pattern_columns(row["patterns"])]
        table.add_row(*names, *costs, *([row["reference"]] if wide else []))
    return console.print(table)


def _pattern_columns(patterns: list[str]) -> tuple[str, str, str]:
    """Self, cross and other patterns in a word each."""

    def forms(kind: str) -> str:
        found = [p.removesuffix(kind) for p in patterns if p.endswith(kind) and p != "grid-cross"]
        return "both" if len(found) == 2 else "".join(found)

    other = [p for p in patterns if p == "grid-cross" or not p.endswith(("-self", "-cross"))]
    return forms("-self"), forms("-cross"), ", ".join(other)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name from `manyheads list`.")],
    as_json: AsJson = False,
) -> None:
    """Show one mechanism: card, equation, stages, cost, arguments and an example that runs."""
    cls, facts = mechanism_class(name), _facts(name)
    facts["description"] = inspect.getdoc(cls) or ""
    facts["arguments"] = _arguments(cls)
    facts["example"] = example_code(cls)
    if as_json:
        return _print_json(facts)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{name}[/bold]  {facts['title']}, {facts['reference']}\n")
    console.print(facts["description"] + "\n", markup=False)
    facts["takes"] = [f"{name}: {what}" for name, what in facts["takes"].items()]
    for key in ("family", "patterns", "time", "state", "resizes", "decodes", "stages", "takes", "notes"):
        value = "; ".join(facts[key]) if key == "takes" else facts[key]
        value = ", ".join(value) if isinstance(value, list) else value
        if value != "":
            console.print(f"{key:>9}  {value}", markup=False)
    console.print("\narguments")
    for argument, default in facts["arguments"].items():
        console.print(f"  {argument} = {default}", markup=False)
    return console.print("\n" + facts["example"], markup=False)


def _arguments(cls: type[Mechanism]) -> dict[str, str]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: "required" if p.default is p.empty else repr(p.default) for p in parameters}


def _example_x(module: Mechanism, pattern: str) -> str:
    if pattern == "maps":
        sizes = module.map_sizes(8, 8)
        widths = module.map_dims or (module.dim,) * len(sizes)
        parts = (f"torch.randn(2, {h}, {w}, {wide})" for (h, w), wide in zip(sizes, widths, strict=True))
        return f"({', '.join(parts)},)"
    sides = {"grid": "6, 8", "grid-cross": "6, 8", "volume": "4, 6, 8"}.get(pattern, "16")
    return f"torch.randn({1 if module.card.takes else 2}, {sides}, {module.dim})"


def example_code(cls: type[Mechanism]) -> str:
    """A few lines that build the mechanism and call it, by the first pattern that its card declares."""
    pattern = min(cls.card.patterns, key=lambda p: (p != "causal-self", p.cross, p))
    arguments = {"dim": 64, "heads": 4, **cls.card.example}
    dim, heads = arguments.pop("dim"), arguments.pop("heads")
    more = "".join(f", {key}={value!r}" for key, value in {**arguments, "causal": pattern.causal}.items())
    module = cls(dim, heads, **arguments, causal=pattern.causal)
    lines = [
        "import torch",
        "from manyheads import create_attention",
        "",
        f"attention = create_attention({cls.card.name!r}, {dim}, {heads}{more})",
        f"x = {_example_x(module, pattern)}",
    ]
    call = "x"
    if pattern.cross:
        size = "1, 16" if module.card.takes else "2, 12"
        sources, one = module.sources, f"torch.randn({size}, {module.source_dim or dim})"
        lines.append(f"context = {one}" if sources == 1 else f"context = ({', '.join([one] * sources)})")
        call = "x, context"
    if pattern == "graph":
        lines.append("edges = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 0]])  # sources above targets")
        call = "x, edges=edges"
    if module.card.takes:
        lines.append(f"# reads {'; '.join(f'{k}: {what}' for k, what in module.card.takes.items())}")
        call += f", **attention.example_inputs(16{', edges' * (pattern == 'graph')})"
    if pattern == "maps" and isinstance(module.result_size(*module.map_sizes(8, 8))[0], tuple):
        return "\n".join([*lines, f"print([part.shape for part in attention({call}).output])"])
    return "\n".join([*lines, f"print(attention({call}).output.shape)"])


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

    cls = find_class(target)
    findings = []
    console = Console(highlight=False, soft_wrap=True)
    for finding in examine_mechanism(cls, patterns=pattern, properties=property_, config=_json_object(config)):
        findings.append(finding)
        if not as_json:
            mark = "[green]holds[/green]" if finding.holds else "[red]FAILS[/red]"
            console.print(f"{mark}  {finding.pattern:<15} {finding.property:<16} {finding.claim}")
            if not finding.holds:
                console.print(f"       smallest failing input: {finding.message}", markup=False)
    failed = [f for f in findings if not f.holds]
    if as_json:
        _print_json([vars(f) for f in findings])
    else:
        console.print(f"{cls.card.name}: {len(findings) - len(failed)} of {len(findings)} properties hold")
    if failed or not findings:
        raise typer.Exit(1)


def _json_object(text: str) -> dict[str, Any]:
    value = parse_json(text, f"--config {shown(text)}")
    if not isinstance(value, dict):
        raise ValueError(f"--config {shown(text)} is not a JSON object; want one such as '{{\"window\": 64}}'")
    return value


def find_class(target: str) -> type[Mechanism]:
    """The class behind a registered name or `package.module:Class`, seen from the current folder."""
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
    return isinstance(found, type) and issubclass(found, Mechanism) and hasattr(found, "card")


app.command()(compare)
app.command()(heads)
app.command()(shrink)
app.command()(convert)
app.command()(serve)
app.add_typer(explain, name="explain")
app.add_typer(steer, name="steer")


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, devices and which fast paths are available here."""
    from manyheads.runs.environment import environment, fast_paths

    if as_json:
        return _print_json({"environment": environment(), "fast_paths": fast_paths()})
    console = Console(highlight=False, soft_wrap=True)
    for title, facts in (("environment", environment()), ("fast paths", fast_paths())):
        console.print(f"[bold]{title}[/bold]")
        for key, value in facts.items():
            console.print(f"  {key:<34} {value}", markup=False)
    return None


# Set, it shows where an error was raised, of whatever kind it is.
TRACEBACK = "MANYHEADS_TRACEBACK"
_BUG = 70  # EX_SOFTWARE of sysexits.h
_MOST_SAID = 2000


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. What went wrong is told in one line on stderr: exit code 2 for what a user can mend, 70
    for a bug."""
    try:
        code = app(arguments, prog_name="manyheads", standalone_mode=False)
    except KeyboardInterrupt:
        code = _told("interrupted", 130)
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
