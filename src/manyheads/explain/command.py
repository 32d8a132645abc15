"""The command `manyheads explain`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from manyheads.explain.studies.command import study
from manyheads.runs.files import check_folder
from manyheads.runs.given import read_text

MOST_TEXT = 4_000_000


class Default(TyperGroup):
    """`explain MODEL ...` is `explain page MODEL ...`; only `study` has to be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] not in (["study"], ["page"]):
            args = ["page", *args]
        return list(super().parse_args(ctx, args))


explain = typer.Typer(
    cls=Default, help="Show what every head does: `explain MODEL --text ...`, or `explain study NAME`."
)
explain.command("study")(study)


@explain.command("page", epilog="Training dynamics on synthetic tasks: `manyheads explain study`.")
def page(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub name, .gguf file, smollm2 or vlm; else the packaged byte model.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The text to explain.")] = None,
    file: Annotated[Path | None, typer.Option(help="A UTF-8 text file to explain.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to explain, for a vision model; with --text for a model like vlm.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="What to explain: a text whose first token is asked for, or a class. Default: the answer."),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this attribution; may be repeated.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers: 0,3 or 2-5.")] = None,
    stage: Annotated[
        int | None, typer.Option(help="Of a picture: Grad-CAM on this stage, or layer on one grid, from 0 on.")
    ] = None,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Score all heads by the detectors.")] = True,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="All samples and steps, however long a large model takes.")
    ] = False,
    size: Annotated[float, typer.Option("--page-mb", min=1, max=512, help="Room for the page, in MB.")] = 48,
    out: Annotated[Path, typer.Option(help="Folder for explain.html and explain.json.")] = Path("explanation"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show where a model's attention goes and what it is worth, as one page that opens offline."""
    from manyheads.explain.drawn import draws, explain_drawing, print_drawing
    from manyheads.explain.explanation import explain_image, explain_text
    from manyheads.hosts.loading import load_any

    given = [name for name, own in (("--text", text), ("--file", file), ("--image", image)) if own is not None]
    if len(given) == 0 or given[:2] == ["--text", "--file"]:
        raise ValueError(f"give one of --text, --file and --image; got {', '.join(given) or 'none'}")
    check_folder(out)
    content = read_text(file, most=MOST_TEXT, what="--file") if file is not None else text
    if stage is not None and (image is None or content is not None):
        raise ValueError("--stage goes with --image alone: it is a stage of a model that classifies pictures")
    if image is not None and content is not None:
        if method or target is not None:
            raise ValueError("--method and --target do not go with a picture and a text: the answer is explained")
        _page_of_sight(model, image, content, _numbers(layers), size, out, as_json)
        return
    loaded = load_any(model)
    if loaded.model.config.model_type == "llava":
        raise ValueError(f"{loaded.name} reads a picture and a text together: give --image and --text")
    shared: dict[str, Any] = {"methods": method, "target": target, "layers": _numbers(layers), "page_mb": size}
    printed = _print
    with _told() as tell:
        if draws(loaded.model):
            if content is None or method or target is not None:
                raise ValueError(f"{loaded.name} draws what a caption says: give --text, without --method and --target")
            found, printed = explain_drawing(loaded, content, layers=_numbers(layers), progress=tell), print_drawing
        elif image is not None:
            found = explain_image(loaded, image, stage=stage, progress=tell, **shared)
        else:
            assert content is not None
            found = explain_text(loaded, content, heads=heads, progress=tell, thorough=thorough, **shared)
    written, data = found.write(out)
    if as_json:
        typer.echo(json.dumps({"files": {"page": str(written), "data": str(data)}, **found.report}, indent=1))
        return
    printed(found.report)
    typer.echo(f"\npage: {written}")


def _page_of_sight(
    model: str | None, image: Path, text: str, layers: list[int] | None, size: float, out: Path, as_json: bool
) -> None:
    """A picture and a text, for a model that reads both."""
    from manyheads.explain.seen import explain_sight, print_sight
    from manyheads.hosts.seeing import load_seeing

    seeing = load_seeing(model)
    with _told() as tell:
        found = explain_sight(seeing, image, text, layers=layers, page_mb=size, progress=tell)
    written, data = found.write(out)
    if as_json:
        typer.echo(json.dumps({"files": {"page": str(written), "data": str(data)}, **found.report}, indent=1))
        return
    print_sight(found.report)
    typer.echo(f"\npage: {written}")


def _numbers(text: str | None) -> list[int] | None:
    """'0,3' or '2-5'."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not all(re.fullmatch(r"[0-9]{1,4}", own) for own in (first, *([last] if dash else []))):
            raise ValueError(f"--layers {text!r}: want numbers such as 0,3 or 2-5")
        found += range(int(first), int(last if dash else first) + 1)
    return sorted(set(found))


def _told() -> Any:
    """Progress on stderr, with the time left by what is done of the whole."""
    import time
    from contextlib import contextmanager

    from rich.console import Console

    from manyheads.runs.progress import duration

    console, begun = Console(stderr=True, highlight=False), time.perf_counter()

    def tell(what: str, share: float) -> None:
        passed = time.perf_counter() - begun
        left = f"; about {duration(passed / share * (1 - share))} left" if 0 < share < 1 else ""
        console.print(f"{what} ({duration(passed)}{left})", markup=False)

    @contextmanager
    def telling() -> Any:
        yield tell

    return telling()


def _print(report: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from manyheads.explain.explanation import worth

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    if report["answer"]:
        shown = ", ".join(f"{own['name']!r} {worth(own)}" for own in report["answer"])
        console.print(f"answer: {escape(shown)}")
    values = report.get("attributions", {}).get("values")
    if not values:
        return
    faithful = {row["method"]: row for row in report["attributions"].get("faithfulness", [])}
    table = Table(box=SIMPLE_HEAD, title="tokens that count most")
    for header in ("method", *(["deletion", "insertion", "rank correlation"] if faithful else []), "tokens"):
        table.add_column(header)
    for name, own in values.items():
        best = sorted(range(len(own)), key=lambda i: -own[i])[:5]
        row = faithful.get(name)
        cells = [_figure(row[key]) for key in ("deletion", "insertion", "correlation")] if row else []
        table.add_row(name, *cells, escape(" ".join(_token(report["tokens"][i], i) for i in best)))
    console.print(table)


def _token(text: str, place: int) -> str:
    """Without the spaces around it, at which a line of the table would be broken within the quotes."""
    return f"{text.strip() or text!r}@{place}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
