"""The command `manyheads steer`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from manyheads.runs.files import check_folder
from manyheads.runs.given import parse_json, read_text

MOST_TEXT = 1_000_000
MOST_NEW, MOST_STEPS = 512, 200
MOST_TRAINED = 100_000
MOST_RECORD = 100_000_000
PAGE, DATA = "steer.html", "steer.json"


class Default(TyperGroup):
    """`steer MODEL ...` is `steer run MODEL ...`; the others have to be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] not in (["list"], ["run"], ["personalise"]):
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
    _print_list(rows)
    if kind not in (None, "diffusion"):
        return None
    from manyheads.steer.personal.form import forms

    return _print_forms(forms())


def facts(method: Any) -> dict[str, Any]:
    """A method as plain values: an argument without a default is None and named in `needs`."""
    given, empty = method.arguments, inspect.Parameter.empty
    return {
        "name": method.name,
        "title": method.title,
        "source": method.source,
        "kinds": list(method.kinds),
        "arguments": {name: None if default is empty else default for name, default in given.items()},
        "needs": method.needs,
        "neutral": dict(method.neutral),
        "strength": method.strength,
        "reach": method.reach,
        "towers": list(method.towers),
        "takes_picture": method.takes_picture,
        "notes": inspect.getdoc(method.open) or "",
    }


def _one(images: Sequence[Path]) -> Path | None:
    if len(images) > 1:
        raise ValueError(f"--image is given {len(images)} times ({', '.join(map(str, images))}): want one picture")
    return images[0] if images else None


@steer.command("run", epilog="Which interventions there are: `manyheads steer list`.")
def run(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub name, .gguf file or smollm2; else the packaged byte model.")
    ] = None,
    with_: Annotated[
        str | None, typer.Option("--with", help="The intervention: NAME, or NAME\\[key=value,heads=3.1,4.2].")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="A UTF-8 text file that holds the prompt.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="The prompt's one picture, for a model that reads both, such as vlm.")
    ] = None,
    span: Annotated[list[str] | None, typer.Option(help="Words of the prompt to mark; may be repeated.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="As a user's message in the model's chat template.")] = False,
    wanted: Annotated[
        str | None, typer.Option(help="What the answer might begin with: its probability is followed.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Values of an argument, factor=0.5,1,2: effect against damage.")
    ] = None,
    new: Annotated[int | None, typer.Option(min=1, max=MOST_NEW, help="Tokens of the answer; 24 by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=MOST_STEPS, help="Steps of a drawing; 20 by default.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of a drawing's noise; 0 by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for steer.html and steer.json.")] = Path("steered"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Run a model with an intervention and without, side by side: answers or drawings, attention, cost."""
    from manyheads.runs.environment import environment
    from manyheads.runs.results import write_json
    from manyheads.steer.asked import parse, parse_sweep

    if with_ is None:
        raise ValueError("give --with NAME; `manyheads steer list` says which there are")
    if (text is None) == (file is None):
        raise ValueError(f"give one of --text and --file; got {'none' if text is None else 'both'}")
    content = read_text(file, most=MOST_TEXT, what="--file") if file is not None else text
    assert content is not None
    check_folder(out)
    method, arguments = parse(with_)
    over = parse_sweep(method, sweep) if sweep is not None else None
    asked = Asked(method, arguments, over, content, _one(image or []), span or (), chat, wanted, new, steps, seed)
    report, shown = asked.run(model)
    record = {**report, "text": content, "environment": environment(), "created": _now()}
    data, page = write_json(record, out / DATA), shown.write_report(record, out / PAGE)
    files = {"page": str(page), "data": str(data), **_pictures(record, out)}
    if as_json:
        stored = parse_json(read_text(data, most=MOST_RECORD), str(data))  # without what is not finite
        return typer.echo(json.dumps({"files": files, **stored}, indent=1))
    _print(record, shown)
    return typer.echo(f"\npage: {page}")


@steer.command("personalise", epilog="Which forms there are: `manyheads steer list --kind diffusion`.")
def personalise(
    model: Annotated[str, typer.Argument(help="A model that draws: dit, unet, or the folder of one.")],
    with_: Annotated[str, typer.Option("--with", help="The form: NAME, or NAME\\[weight=0.1].")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture to learn from; may be repeated.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder: NAME.png, its caption NAME.txt, a mask NAME.WORD.png.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The caption of pictures that have no NAME.txt.")] = None,
    subject: Annotated[
        list[str] | None, typer.Option(help="A word to learn: NEW=KNOWN begins as that; may be repeated.")
    ] = None,
    draw: Annotated[list[str] | None, typer.Option(help="A caption that all sides draw; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=MOST_TRAINED, help="Steps of training.")] = 200,
    rate: Annotated[float | None, typer.Option(help="The learning rate; the form's own by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of batches and noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the model, personalised.json and .html.")] = Path(
        "personalised"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Teach a model that draws a subject from a few pictures, beside plain fine-tuning; what is made opens by --out."""
    from manyheads.hosts.loading import load_any
    from manyheads.runs.environment import environment
    from manyheads.steer.asked import parse_as
    from manyheads.steer.personal.form import form
    from manyheads.steer.personal.report import table, write_report
    from manyheads.steer.personal.run import DATA, PAGE, begun, check_out, personalised, save
    from manyheads.steer.personal.subjects import listed
    from manyheads.steer.personal.training import Plan

    chosen, arguments = parse_as(with_, form)
    check_out(out, model)
    words = [own.partition("=")[0].strip().lower() for own in subject or ()]
    files = [*(image or ()), *(listed(images, words) if images is not None else ())]
    loaded = load_any(model)
    base, album = begun(loaded, files, subject or (), text)
    record, made = personalised(base, album, chosen, arguments, Plan(steps, rate=rate, seed=seed), draw=draw or ())
    record = {"model": {"name": loaded.name, "class": type(base).__name__}, **record}
    record |= {"environment": environment(), "created": _now()}
    save(record, made, out, write_report)
    if as_json:
        return typer.echo(read_text(out / DATA, most=MOST_RECORD))
    from manyheads.runs.tables import rich_table

    columns, lines = table(record)
    _console().print(rich_table(columns, lines, range(len(columns))))
    return typer.echo(f'\npage: {out / PAGE}\ndraws as: manyheads explain {out} --text "{album.captions[0]}"')


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    method: Any
    arguments: dict[str, Any]
    sweep: tuple[str, list[Any]] | None
    text: str
    image: Path | None
    marks: Sequence[str]
    chat: bool
    wanted: str | None
    new: int | None
    steps: int | None
    seed: int | None

    def run(self, name: str | None) -> tuple[dict[str, Any], Any]:
        """The record of both runs, and the module that shows it."""
        from manyheads.hosts.loading import load_any
        from manyheads.hosts.seeing import seen_by
        from manyheads.steer.prompting import kind_of

        loaded = load_any(name)
        if draws(loaded.model):
            return self._drawn(loaded)
        self._refuse({"--steps": self.steps, "--seed": self.seed}, f"{loaded.name} draws nothing")
        if self.image is not None:
            if self.chat:
                raise ValueError("--chat goes with text alone; a model with pictures is asked in its own template")
            from manyheads.hosts.image_files import opened_image
            from manyheads.steer.prompting import picture_prompt

            picture, seeing = opened_image(self.image), seen_by(loaded)
            prompt = picture_prompt(seeing, picture, self.text, self.marks)
            return self._answered(seeing.loaded, kind_of(seeing.model), prompt)
        from manyheads.steer.prompting import text_prompt

        kind = kind_of(loaded.model)
        if kind != "language":
            raise ValueError(f"{loaded.name} is a {kind} model: give --image with the --text")
        return self._answered(loaded, kind, text_prompt(loaded, self.text, self.marks, chat=self.chat))

    def _answered(self, loaded: Any, kind: str, prompt: Any) -> tuple[dict[str, Any], Any]:
        from manyheads.steer import report
        from manyheads.steer.run import steered, wanted_token

        hoped = wanted_token(loaded, "" if self.chat or self.image else self.text, self.wanted)
        record = steered(
            loaded,
            self.method,
            self.arguments,
            prompt,
            kind=kind,
            new=self.new or 24,
            wanted=hoped,
            sweep=self.sweep,
            tell=_tell,
        )
        return record, report

    def _drawn(self, loaded: Any) -> tuple[dict[str, Any], Any]:
        from manyheads.hosts.image_files import opened_image
        from manyheads.steer import drawn_report
        from manyheads.steer.diffusion.drawing import Drawing, pixels_of
        from manyheads.steer.drawn import check_drawing, steered_drawing

        typed = {"--span": self.marks or None, "--chat": self.chat or None, "--new": self.new}
        self._refuse(typed, f"{loaded.name} draws what a caption says")
        check_drawing(loaded, self.method, self.text, self.image is not None)
        picture = None if self.image is None else pixels_of(loaded.model, opened_image(self.image))
        drawing = Drawing(self.text, steps=self.steps or 20, seed=self.seed or 0, picture=picture)
        record = steered_drawing(
            loaded, self.method, self.arguments, drawing, wanted=self.wanted, sweep=self.sweep, tell=_tell
        )
        return record, drawn_report

    def _refuse(self, typed: dict[str, Any], why: str) -> None:
        given = next((option for option, value in typed.items() if value is not None), None)
        if given is not None:
            raise ValueError(f"{why}: leave {given} out")


def draws(model: Any) -> bool:
    from manyheads.steer.prompting import kind_of

    try:
        return kind_of(model) == "diffusion"
    except ValueError:
        return False


def _pictures(record: dict[str, Any], out: Path) -> dict[str, str]:
    """Both drawings as files, such as --image takes."""
    if "pictures" not in record:
        return {}
    from manyheads.runs.files import write_atomically
    from manyheads.steer.drawn_report import png

    return {side: str(write_atomically(out / f"{side}.png", png(own[0]))) for side, own in record["pictures"].items()}


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
    for header in ("name", "models", "of", "arguments", "what it does", "source"):
        table.add_column(header, no_wrap=header == "name")
    for row in rows:
        own = ", ".join(f"{k}=" if k in row["needs"] else f"{k}={v}" for k, v in row["arguments"].items())
        table.add_row(
            row["name"], ", ".join(row["kinds"]), ", ".join(row["towers"]), escape(own), row["title"], row["source"]
        )
    _console().print(table)


def _print_forms(found: Sequence[Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="steer personalise: forms of training", box=SIMPLE_HEAD, padding=(0, 1))
    for header in ("name", "arguments", "what it does", "source"):
        table.add_column(header, no_wrap=header == "name")
    for form in found:
        own = ", ".join(f"{name}={value}" for name, value in form.arguments.items())
        table.add_row(form.name, escape(own), form.title, form.source)
    _console().print(table)


def _print(record: dict[str, Any], shown: Any) -> None:
    from manyheads.runs.tables import rich_table

    console = _console()
    for line in shown.text_of(record):
        console.print(line, markup=False)
    console.print()
    for line in shown.headline(record):
        console.print(line, markup=False)
    for columns, lines in shown.tables(record):
        console.print(rich_table(columns, lines, range(len(columns))))
