"""The command `manyheads compare`."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from manyheads.runs.given import shown
from manyheads.runs.names import parse_name, parse_names
from manyheads.runs.options import Scheduler

MOST_SEEDS = 10_000


def compare(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Mechanisms, as `manyheads list` names them; with arguments: 'moba\\[block=64,top_k=2]'; one per "
            "layer as one contestant: 'based,based,softmax'. A bare name has the arguments that the "
            "experiment or preset gives it. Default: all of those.",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Every mechanism that a task has a place for, with its defaults where the preset has none; those that "
            "read what no model passes are left out, by name.",
        ),
    ] = False,
    experiment: Annotated[Path | None, typer.Option(help="A YAML file that says what to run.")] = None,
    preset: Annotated[str | None, typer.Option(help="quick (minutes), standard, or full.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Only this task; may be repeated. cab: seven, in four patterns, and an index over them."),
    ] = None,
    width: Annotated[
        list[int] | None, typer.Option(help="Width of the tasks' models; may be repeated, for one model each.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the tasks' models.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Of the tasks' models: none, rotary, learned, or boxes.")
    ] = None,
    beyond: Annotated[
        list[int] | None,
        typer.Option(
            help="Score the trained models at so many times the trained length too; may be repeated. Where positions "
            "are learned, that is refused: take --positions none or rotary."
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="How many seeds, or which: 3, or 0,7.")] = None,
    section: Annotated[
        list[str] | None, typer.Option(help="Only quality, speed, memory or decode; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results; one that is there is continued.")] = Path("results"),
    scheduler: Scheduler = None,
    processes: Annotated[
        int | None, typer.Option(help="Train each cell over so many processes, each with a part of the sequence.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run stored failures again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare mechanisms by quality, speed, memory and decode cost. Stopped runs go on where they were."""
    from manyheads.compare.summary import summarise
    from manyheads.runs.results import done

    from .experiment import create_experiment, read_experiment
    from .run import run_experiment

    changes = read_experiment(experiment) if experiment else {}
    if everything:
        names = _all_names(changes, names, preset, task)
        if left_out := unpassed_names():
            words = "left out, as they read more than their tokens and no task has it"
            typer.echo(f"{words}: {', '.join(left_out)} (`manyheads show NAME` says what)", err=True)
    changes |= changes_of(changes, names, preset, task, seeds, section)
    if processes is not None:
        changes["processes"] = processes
    changes |= resized(changes, width or [], layers, positions, beyond or [])
    if everything:
        changes["mechanisms"] = [as_on_card(entry) for entry in changes["mechanisms"]]
    built = create_experiment(changes, where=str(experiment or "compare"))
    for line in depths(built):
        typer.echo(line, err=True)
    results = run_experiment(built, out, scheduler=scheduler, retry_failed=retry_failed)
    if as_json:
        files = {"results": str(out / "results.json"), "report": str(out / "report.html")}
        typer.echo(json.dumps({"files": files, "summary": summarise(results)}, indent=2))
    else:
        from rich.console import Console

        from .tables import print_table

        print_table(results, Console(highlight=False, width=None if sys.stdout.isatty() else 100))
        typer.echo(f"\nreport: {out / 'report.html'}")
    if not any(done(cell) for cell in results["cells"]):
        raise typer.Exit(1)


def _all_names(
    given: Mapping[str, Any], names: list[str] | None, preset: str | None = None, tasks: list[str] | None = None
) -> list[str]:
    """Every mechanism that one of the tasks has a place for."""
    from manyheads.registry import list_attentions
    from manyheads.tasks import task_class

    from .experiment import preset as read_preset
    from .train import has_place

    if names or "mechanisms" in given:
        raise ValueError("--all names every mechanism: leave names, and the experiment's mechanisms, out")
    entries = changes_of(given, preset=preset, tasks=tasks).get("tasks") or given.get("tasks")
    entries = entries or read_preset(preset or given.get("preset", "quick"))["tasks"]
    classes = [task_class(entry if isinstance(entry, str) else entry["name"]) for entry in entries]
    return [name for name in list_attentions() if any(has_place(task, name) for task in classes)]


def unpassed_names() -> list[str]:
    """Every mechanism that has no place in any task because of what it reads beside its tokens."""
    from manyheads.registry import list_attentions

    from .train import unpassed

    return [name for name in list_attentions() if unpassed(name)]


def as_on_card(entry: Any) -> Any:
    """A bare name; where the mechanism cannot be built without arguments, or has heads of its own (one, mostly), with
    those of its card's example."""
    from manyheads.registry import mechanism_class

    if not isinstance(entry, str):
        return entry
    cls = mechanism_class(entry)
    needed = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    own = [name for name in (*needed, "heads") if name in cls.card.example and name != "dim"]
    more = {name: cls.card.example[name] for name in own}
    return {"name": entry, **more} if more else entry


def changes_of(
    given: Mapping[str, Any],
    names: list[str] | None = None,
    preset: str | None = None,
    tasks: list[str] | None = None,
    seeds: str | None = None,
    sections: list[str] | None = None,
) -> dict[str, Any]:
    """What the command line asks for on top of the given experiment, as `create_experiment` takes it."""
    from manyheads.tasks import task_group

    from .experiment import preset as read_preset

    tasks = tasks and [one for name in tasks for one in task_group(name)]
    changes: dict[str, Any] = {} if preset is None else {"preset": preset}
    for key, wanted in (("mechanisms", names), ("tasks", tasks)):
        if wanted:
            base = read_preset(preset or given.get("preset", "quick"))
            known = given[key] if key in given else base[key]
            others = base.get("arguments", {}) if key == "mechanisms" else {}
            changes[key] = [entry for name in wanted for entry in _as_asked(key, name, known, others)]
    if seeds is not None:
        changes["seeds"] = parse_seeds(seeds)
    if sections:
        changes["sections"] = sections
    return changes


def resized(
    changes: Mapping[str, Any],
    widths: list[int],
    layers: int | None,
    positions: str | None = None,
    beyond: Sequence[int] = (),
) -> dict[str, Any]:
    """The tasks once per width, with as many layers and such positions, scored at so many times their length too, as
    `create_experiment` takes it; {} where nothing is asked."""
    from .experiment import preset as read_preset

    given: dict[str, Any] = {"layers": layers, "positions": positions}
    asked = {key: value for key, value in given.items() if value is not None}
    sizes = [asked | size for size in [{"hidden_size": width} for width in dict.fromkeys(widths)] or [{}]]
    training = {"beyond": list(dict.fromkeys(beyond))} if beyond else {}
    if sizes == [{}] and not training:
        return {}
    tasks = changes["tasks"] if "tasks" in changes else read_preset(changes.get("preset", "quick"))["tasks"]
    if not isinstance(tasks, list):
        return {}  # refused where the experiment is made
    return {"tasks": [_with(task, model=size, training=training) for task in tasks for size in sizes]}


def _with(task: Any, **sections: Mapping[str, Any]) -> Any:
    entry: Any = {"name": task} if isinstance(task, str) else task
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key, {}), Mapping) for key in sections):
        return task  # refused where the experiment is made
    return {**entry, **{key: {**entry.get(key, {}), **more} for key, more in sections.items() if more}}


def depths(experiment: Any) -> list[str]:
    """Which tasks' models are as deep as they are for a hybrid's sake, in words."""
    hybrids = [entry.label for entry in experiment.mechanisms if entry.layers]
    tasks = dict.fromkeys(f"{entry.name} in {entry.model.layers} layers" for entry in experiment.tasks)
    return [f"{', '.join(tasks)} for all, as {'; '.join(hybrids)} wants it"] if hybrids and tasks else []


def _as_asked(key: str, name: str, known: Any, others: Mapping[str, Any]) -> list[Any]:
    """What one word of the command line stands for; of a hybrid each layer, which must stand for one thing."""
    parsed = parse_names(name) if key == "mechanisms" else parse_name(name)
    if not isinstance(parsed, list):
        return _as_known(parsed, known, others)
    layers = [(part, _as_known(part, known, others)) for part in parsed]
    for part, found in layers:
        if len(found) > 1:
            raise ValueError(
                f"{name}: {part} is there {len(found)} times in the experiment, with other arguments each; say which, "
                f"as {part}[key=value]"
            )
    return [[found[0] for _, found in layers]]


def _as_known(entry: Any, known: Any, others: Mapping[str, Any]) -> list[Any]:
    """A bare name stands for the entries that the experiment has under it, with their arguments, or for the one that
    the preset has besides."""
    entries = known if isinstance(known, list) else []
    same = [other for other in entries if isinstance(other, dict) and other.get("name") == entry]
    if not same and entry not in entries and isinstance(entry, str) and entry in others:
        return [{"name": entry, **others[entry]}]
    return same or [entry]


def parse_seeds(text: str) -> list[int]:
    """'3' for three seeds, '0,7' for those two."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*,?", text) or text == "0":
        raise ValueError(f"--seeds {text!r}: want how many, such as 3, or which, such as 0,7")
    given = [int(part) for part in text.split(",") if part]
    if max(given[0] if "," not in text else 0, len(given)) > MOST_SEEDS:
        raise ValueError(f"--seeds {shown(text)!r}: want at most {MOST_SEEDS:,} of them")
    return list(range(given[0])) if "," not in text else given
