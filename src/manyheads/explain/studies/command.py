"""The command `manyheads explain study NAME`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def study(
    name: Annotated[str | None, typer.Argument(help="A study; all of them are named without it.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, study-NAME without it; one that is there is continued.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds; the study's own number without it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Repeat a published finding on training dynamics, small, with its plot. Stopped runs go on where they were."""
    from manyheads.explain.studies.study import list_studies, study_class

    if name is None:
        known = [study_class(own) for own in list_studies()]
        if as_json:
            facts = [{"name": own.name, "title": own.title, "reference": own.reference, "claim": own.claim}
                     for own in known]  # fmt: skip
            typer.echo(json.dumps(facts, indent=2))
            return
        for own in known:
            typer.echo(f"{own.name:<20} {own.title}, {own.reference}")
        return

    from manyheads.explain.studies.report import print_summary
    from manyheads.explain.studies.running import run_study
    from manyheads.runs.results import done

    study_class(name)
    folder = Path(f"study-{name}") if out is None else out
    results = run_study(name, folder, seeds=seeds)
    if as_json:
        files = {"report": str(folder / "study.html"), "results": str(folder / "study.json")}
        typer.echo(json.dumps({"files": files, "verdict": results["verdict"], "summary": results["summary"]}, indent=2))
    else:
        print_summary(results)
        typer.echo(f"\nreport: {folder / 'study.html'}")
    if not any(done(cell) for cell in results["cells"]):
        raise typer.Exit(1)
