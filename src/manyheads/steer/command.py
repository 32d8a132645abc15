"""The command `manyheads steer`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from manyheads.runs.given import parse_json, read_text

MOST_TEXT = 1_000_000
MOST_NEW = 512


class Default(TyperGroup):
    """`steer MODEL ...` is `steer run MODEL ...`; only `list` has to be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] not in (["list"], ["run"]):
            args = ["run", *args]
        return list(super().parse_args(ctx, args))


steer = typer.Typer(
    cls=Default,
    help="Change what a trained model attends to, and see: `steer MODEL --with NAME --text ...`, or `steer list`.",
)


@steer.command("list")
def list_(
    kind: Annotated[str | None, typer.Option(help="Only those for this kind of model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Name every intervention, with the models that it takes, its arguments and its paper."""
    from manyheads.steer.method import KINDS, methods

    if kind is not None and kind not in KINDS:
        raise ValueError(f"--kind {kind!r}: want one of {', '.join(KINDS)}")
    rows = [facts(method) for method in methods(kind)]
    if as_json:
        return typer.echo(json.dumps(rows, indent=2))
    return _print_list(rows)


def facts(method: Any) -> dict[str, Any]:
    """A method as plain values: an argument without a default is None and named in `needs`."""
    given, empty = method.arguments, inspect.Parameter.empty
    return {
        "name": method.name,
        "title": method.title,
        "source": method.source,
        "kinds": list(method.kinds),
        "arguments": {name: None if default is empty else default for name, default in given.items()},
        "needs": [name for name, default in given.items() if default is empty],
        "neutral": dict(method.neutral),
        "strength": method.strength,
        "notes": inspect.getdoc(method.open) or "",
    }


@steer.command("run", epilog="Which interventions there are: `manyheads steer list`.")
def run(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub name, .gguf file or smollm2; else the packaged byte model.")
    ] = None,
    with_: Annotated[
        str | None, typer.Option("--with", help="The intervention: NAME, or NAME[key=value,heads=3.1,4.2].")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="A UTF-8 text file that holds the prompt.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="The prompt's picture, for a model that reads both, such as vlm.")
    ] = None,
    span: Annotated[list[str] | None, typer.Option(help="Words of the prompt to mark; may be repeated.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="As a user's message in the model's chat template.")] = False,
    wanted: Annotated[
        str | None, typer.Option(help="What the answer might begin with: its probability is followed.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Values of an argument, factor=0.5,1,2: effect against damage.")
    ] = None,
    new: Annotated[int, typer.Option(min=1, max=MOST_NEW, help="Tokens of the answer.")] = 24,
    out: Annotated[Path, typer.Option(help="Folder for steer.html and steer.json.")] = Path("steered"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Run a model with an intervention and without: answers, next tokens, attention, cost, side by side."""
    from manyheads.runs.environment import environment
    from manyheads.runs.results import write_json
    from manyheads.steer.asked import parse, parse_sweep
    from manyheads.steer.report import DATA, PAGE, write_report
    from manyheads.steer.run import steered, wanted_token

    if with_ is None:
        raise ValueError("give --with NAME; `manyheads steer list` says which there are")
    if (text is None) == (file is None):
        raise ValueError(f"give one of --text and --file; got {'none' if text is None else 'both'}")
    content = read_text(file, most=MOST_TEXT, what="--file") if file is not None else text
    assert content is not None
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    method, arguments = parse(with_)
    over = parse_sweep(method, sweep) if sweep is not None else None
    loaded, kind, prompt = _prompted(model, image, content, span or (), chat)
    hoped = wanted_token(loaded, "" if chat or image else content, wanted)
    report = steered(loaded, method, arguments, prompt, kind=kind, new=new, wanted=hoped, sweep=over, tell=_tell)
    record = {**report, "text": content, "environment": environment(), "created": _now()}
    data, page = write_json(record, out / DATA), write_report(record, out / PAGE)
    if as_json:
        stored = parse_json(read_text(data), str(data))  # without what is not finite
        return typer.echo(json.dumps({"files": {"page": str(page), "data": str(data)}, **stored}, indent=1))
    _print(record)
    return typer.echo(f"\npage: {page}")


def _prompted(
    model: str | None, image: Path | None, text: str, marks: Sequence[str], chat: bool
) -> tuple[Any, str, Any]:
    """The model, its kind, and what it is fed."""
    from manyheads.hosts.image_files import opened_image
    from manyheads.hosts.loading import load_any
    from manyheads.hosts.seeing import load_seeing
    from manyheads.steer.prompting import kind_of, picture_prompt, text_prompt

    if image is not None:
        if chat:
            raise ValueError("--chat goes with text alone; a model with pictures is asked in its own template")
        picture = opened_image(image)
        seeing = load_seeing(model)
        return seeing.loaded, kind_of(seeing.model), picture_prompt(seeing, picture, text, marks)
    loaded = load_any(model)
    kind = kind_of(loaded.model)
    if kind != "language":
        raise ValueError(f"{loaded.name} is a {kind} model: give --image with the --text")
    return loaded, kind, text_prompt(loaded, text, marks, chat=chat)


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")


def _tell(what: str, share: float) -> None:
    typer.echo(f"{what} ({share:.0%})", err=True)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def _print_list(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{len(rows)} interventions", box=SIMPLE_HEAD, padding=(0, 1))
    for header in ("name", "models", "arguments", "what it does", "source"):
        table.add_column(header, no_wrap=header == "name")
    for row in rows:
        own = ", ".join(f"{k}=" if k in row["needs"] else f"{k}={v}" for k, v in row["arguments"].items())
        table.add_row(row["name"], ", ".join(row["kinds"]), escape(own), row["title"], row["source"])
    _console().print(table)


def _print(record: dict[str, Any]) -> None:
    from manyheads.runs.tables import rich_table
    from manyheads.steer.report import attention_table, cost_table, headline, next_table, sweep_table

    console = _console()
    for side in ("without", "with"):
        console.print(f"{side:>7}: {record['answers'][side]!r}", markup=False)
    console.print()
    for line in headline(record):
        console.print(line, markup=False)
    tables = [next_table, attention_table, cost_table, *([sweep_table] if "sweep" in record else [])]
    for make in tables:
        columns, lines = make(record)
        console.print(rich_table(columns, lines, range(len(columns))))
