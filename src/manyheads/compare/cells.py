"""Cells: the smallest pieces of a comparison that are run, stored and resumed on their own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from manyheads.compare.hybrid import common_patterns, names_of, specs_of
from manyheads.registry import mechanism_class
from manyheads.runs.cells import Cell
from manyheads.tasks import Task, create_task

from .passes import unspread
from .train import placed

if TYPE_CHECKING:
    from .experiment import Experiment, TaskEntry


def cells_of_experiment(experiment: Experiment) -> list[Cell]:
    """All cells in the order in which they are run; within a chain by ascending length."""
    makers = {"quality": _quality, "speed": _speed, "memory": _memory, "decode": _decode}
    return [cell for kind in experiment.sections for cell in makers[kind](experiment)]


def _mechanisms(experiment: Experiment) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in experiment.mechanisms:
        layers = [{"name": one.name, "args": one.args, "source": source_hash(one.name)} for one in entry.each]
        settings = layers[0] if len(layers) == 1 else {"layers": layers}
        yield entry.label, {"mechanism": settings, "device": experiment.device, "precision": experiment.precision}


def source_hash(name: str) -> str:
    """Of the mechanism's own file: who edits a mechanism and runs again gets new figures, not the stored ones."""
    try:
        text = inspect.getsource(inspect.getmodule(mechanism_class(name)) or mechanism_class(name))
    except (OSError, TypeError):  # typed into an interpreter: there is no file
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _quality(experiment: Experiment) -> Iterator[Cell]:
    tasks = [create_task(entry.name, **entry.args) for entry in experiment.tasks]
    models = [entry.model.model_dump(mode="json") for entry in experiment.tasks]
    for entry, task, model in zip(experiment.tasks, tasks, models, strict=True):
        sizes = [other for same, other in zip(tasks, models, strict=True) if same == task]
        configs = [other.config for other in tasks if other.name == task.name]
        title = _named(task, _differing(task.config, configs) | _differing(model, sizes))
        for seed in experiment.seeds:
            for rate in entry.training.learning_rates:
                for label, shared in _mechanisms(experiment):
                    yield _quality_cell(label, shared, entry, title, task, seed, rate, experiment.processes)


def _quality_cell(
    label: str,
    shared: dict[str, Any],
    entry: TaskEntry,
    title: str,
    task: Task,
    seed: int,
    rate: float,
    processes: int,
) -> Cell:
    place = {"task": title, "n": task.n, "seed": seed, "learning_rate": rate}
    # Cells that were stored before there was a `beyond` have none.
    unsaid = {"learning_rates"} if entry.training.beyond else {"learning_rates", "beyond"}
    training = entry.training.model_dump(mode="json", exclude=unsaid)
    settings = shared | {
        "task": {"name": task.name, "args": task.config},
        "model": entry.model.model_dump(mode="json"),
        "training": training,
        "seed": seed,
        "learning_rate": rate,
    }
    missing = ""
    if processes > 1:  # figures of one process are stored without
        settings["processes"] = processes
        missing = unspread(task, names_of(shared["mechanism"]))
    try:
        placed(task, specs_of(shared["mechanism"]))
    except ValueError as error:
        missing = str(error)
    return Cell("quality", label, place, settings, "", missing)


def _differing(settings: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """What tells these settings from the others, besides the length."""
    return {k: v for k, v in settings.items() if k != "n" and any(other[k] != v for other in others)}


def _named(task: Task, differs: dict[str, Any]) -> str:
    """The name, with whatever besides the length tells tasks of one name apart: arguments, and the model around it."""
    inner = ",".join(f"{key}={value}" for key, value in sorted(differs.items()))
    return f"{task.name}[{inner}]" if inner else task.name


def measured_pattern(*names: str) -> str:
    """The pattern by which speed and memory are measured, of all layers: causal self-attention where it is declared."""
    order = ["causal-self", "noncausal-self", "grid", "causal-cross", "noncausal-cross"]
    declared = [p.value for p in common_patterns(names)]
    return min(declared, key=lambda p: (order.index(p) if p in order else len(order), p))


def _speed(experiment: Experiment) -> Iterator[Cell]:
    settings = experiment.speed.model_dump(mode="json", exclude={"lengths", "turns"})
    for turn in range(1, experiment.speed.turns + 1):
        yield from _lengths("speed", experiment, experiment.speed.lengths, settings, turn)


def _memory(experiment: Experiment) -> Iterator[Cell]:
    settings = experiment.memory.model_dump(mode="json", exclude={"lengths"})
    yield from _lengths("memory", experiment, experiment.memory.lengths, settings, 1)


def _lengths(
    kind: str, experiment: Experiment, lengths: tuple[int, ...], settings: dict[str, Any], turn: int
) -> Iterator[Cell]:
    for label, shared in _mechanisms(experiment):
        pattern = measured_pattern(*names_of(shared["mechanism"]))
        for n in sorted(set(lengths)):
            place = {"n": n, "causal": pattern.startswith("causal"), "pattern": pattern, "turn": turn}
            whole = shared | {kind: settings, "n": n, "pattern": pattern, "turn": turn}
            yield Cell(kind, label, place, whole, f"{kind} {label} {turn}")


def _decode(experiment: Experiment) -> Iterator[Cell]:
    settings = experiment.decode.model_dump(mode="json", exclude={"contexts", "turns"})
    for turn in range(1, experiment.decode.turns + 1):
        for label, shared in _mechanisms(experiment):
            cards = [mechanism_class(name).card for name in names_of(shared["mechanism"])]
            decodes = all(card.decodes and "causal-self" in card.patterns for card in cards)
            missing = "" if decodes else f"{label} does not decode step by step"
            for context in sorted(set(experiment.decode.contexts)):
                whole = shared | {"decode": settings, "context": context, "turn": turn}
                yield Cell(
                    "decode", label, {"context": context, "turn": turn}, whole, f"decode {label} {turn}", missing
                )
