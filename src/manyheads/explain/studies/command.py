"""The command `manyheads explain study NAME`."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from manyheads.runs.options import Scheduler


def study(
    name: Annotated[str | None, typer.Argument(help="A study; all of them are named without it.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, study-NAME without it; one that is there is continued.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds; the study's own number without it.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose heads, for a study of a trained model: a folder, hub name or smollm2.")
    ] = None,
    scheduler: Scheduler = None,
    listed: Annotated[bool, typer.Option("--list", help="Name every study with its claim and its seeds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Repeat a published finding, small, with its plot. Stopped runs go on where they were."""
    from manyheads.explain.studies.study import study_class

    if listed and name is not None:
        raise ValueError(f"--list names every study: leave {name} or --list out")
    if name is None:
        print_studies(claims=listed, as_json=as_json)
        return

    from manyheads.explain.studies.report import print_summary
    from manyheads.explain.studies.running import run_study
    from manyheads.runs.results import done

    study_class(name)
    folder = Path(f"study-{name}") if out is None else out
    settings = {} if model is None else {"model": model}
    results = run_study(name, folder, seeds=seeds, settings=settings, scheduler=scheduler)
    if as_json:
        files = {"report": str(folder / "study.html"), "results": str(folder / "study.json")}
        typer.echo(json.dumps({"files": files, "verdict": results["verdict"], "summary": results["summary"]}, indent=2))
    else:
        print_summary(results)
        typer.echo(f"\nreport: {folder / 'study.html'}")
    if not any(done(cell) for cell in results["cells"]):
        raise typer.Exit(1)


def print_studies(*, claims: bool, as_json: bool) -> None:
    """claims: with each claim and the seeds that it is decided over."""
    from manyheads.explain.studies.study import list_studies, study_class

    known = [study_class(own) for own in list_studies()]
    if as_json:
        keys = ("name", "title", "reference", "claim", "seeds")
        typer.echo(json.dumps([{key: getattr(own, key) for key in keys} for own in known], indent=2))
        return
    for own in known:
        seeds = f", {own.seeds} seeds" if claims else ""
        typer.echo(f"{own.name:<22} {own.title}, {own.reference}{seeds}")
        if claims:
            typer.echo(
                textwrap.fill(own.claim, 100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
            )
