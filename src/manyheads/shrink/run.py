"""Runs what a command asks for: one cell per variant, task and length, each stored as it finishes, none run twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import manyheads
from manyheads.hosts.families import layer_plans
from manyheads.hosts.fingerprint import fingerprint
from manyheads.hosts.loading import Loaded, load_model, reopened_as
from manyheads.hosts.questions import Questions, Trial
from manyheads.runs.cells import Cell, same_here
from manyheads.runs.cluster import run_anywhere
from manyheads.runs.environment import environment
from manyheads.runs.loop import Outcome, public
from manyheads.runs.outcome import outcome_of
from manyheads.runs.progress import Progress, duration
from manyheads.runs.results import SCHEMA
from manyheads.runs.sizes import Speed
from manyheads.runs.store import Store, now
from manyheads.shrink.measure import (
    Reference,
    follow,
    measure_answers,
    measure_cost,
    measure_text,
    take_reference,
    windows_cut,
)
from manyheads.shrink.plan import DENSE, GREEDY, STEPS, TAIL, Plan
from manyheads.shrink.policy import Policy
from manyheads.shrink.report import write_outputs
from manyheads.shrink.variants import Variant


def check_positions(loaded: Loaded, plan: Plan) -> None:
    """A ValueError where the model cannot be shrunk, or has no positions for what the plan asks."""
    layer_plans(loaded.model)
    most = getattr(loaded.config, "max_position_embeddings", None)
    if most is not None and max(plan.lengths) + STEPS > most:
        raise ValueError(
            f"--length {max(plan.lengths)}: {loaded.name} knows {most} positions, and {STEPS} more are decoded"
            f"; give at most {most - STEPS}"
        )
    for kind, amount in (variant.budget or ("", 0) for variant in plan.variants):
        if most is not None and kind == "budget_tokens" and amount > most:
            raise ValueError(
                f"--budget-tokens {amount}: {loaded.name} knows {most} positions, so nothing would ever be "
                f"dropped; give less"
            )


class Study:
    """One model, one plan. Cells know nothing of each other but the dense cache's distributions, taken once."""

    def __init__(self, loaded: Loaded, plan: Plan, questions: Questions) -> None:
        self.loaded, self.plan, self.questions = loaded, plan, questions
        self._check()
        self._policies = {variant.title: variant for variant in plan.variants}

    def _check(self) -> None:
        """What would fail in every cell is said before the first."""
        model, plan = self.loaded.model, self.plan
        check_positions(self.loaded, plan)
        for length in plan.lengths:
            if "recall" in plan.tasks:
                self.questions.recall(length, 0)
            if {"passkey", "needle"} & set(plan.tasks):
                self.questions.passkey(length, 0.0, 0)
        self.questions.windows(plan.context, 1)
        probe = Trial(self.questions.windows(max(16, min(plan.lengths) // 4), 1)[0], [0, 0, 0], ())
        for variant in plan.variants:
            _probe(model, variant, probe)

    # -- cells -------------------------------------------------------------------------------------------------------

    @cached_property
    def cells(self) -> list[Cell]:
        """Task by task, the dense cache first; the cost of every variant at the end."""
        plan = self.plan
        made = []
        for task in plan.tasks:
            lengths = (plan.context,) if task == "perplexity" else plan.lengths
            for length in lengths:
                made += [
                    self._cell("text" if task == "perplexity" else "answers", title, task, length)
                    for title in (DENSE, *self._policies)
                ]
        return made + [self._cell("cost", title, "cost", plan.context) for title in self._policies]

    def _cell(self, kind: str, title: str, task: str, length: int) -> Cell:
        variant, sizes = self._policies.get(title), self.plan.sizes
        settings = self._shared | {
            "variant": None if variant is None else variant.settings(),
            "task": task,
            "length": length,
        }
        if task == "perplexity":
            settings |= {"tail": TAIL, "greedy": GREEDY, "windows": sizes.windows}
        elif task == "cost":
            settings |= {"steps": STEPS, "repeats": sizes.repeats}
        else:
            settings |= {"trials": sizes.trials, "ask": self.plan.ask, "depths": list(sizes.depths)}
        return Cell(kind, title, {"task": task, "n": length}, settings, "")

    @cached_property
    def _shared(self) -> dict[str, Any]:
        model = self.loaded.model
        parameter = next(model.parameters())
        return {
            "model": asdict(fingerprint(model, "")),
            "dtype": str(parameter.dtype),
            "device": parameter.device.type,
            "seed": self.plan.seed,
            "text": hashlib.sha256(self.questions.text.encode()).hexdigest()[:16],
            **({} if self.questions.turn is None else {"turn": self.questions.turn}),
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        variant = self._policies.get(cell.mechanism)
        policy = None if variant is None else variant.build()
        model, task, length = self.loaded.model, cell.place["task"], cell.place["n"]
        if task == "cost":
            assert policy is not None
            prompt = self.questions.windows(length, 1)[0]
            return measure_cost(model, policy, prompt, steps=STEPS, repeats=self.plan.sizes.repeats)
        if task == "perplexity":
            return measure_text(model, policy, self._windows, self._reference)
        return measure_answers(model, policy, self.trials(task, length))

    def trials(self, task: str, length: int) -> list[Trial]:
        numbers = range(self.plan.sizes.trials)
        if task == "recall":
            made = [self.questions.recall(length, number) for number in numbers]
        else:
            ask: Callable[[int, float, int], Trial] = getattr(self.questions, task)
            made = [ask(length, depth, number) for depth in self.plan.sizes.depths for number in numbers]
        return made if self.plan.ask == "after" else [one for trial in made for one in trial.within()]

    def weight(self, cell: Cell) -> float:
        """What a cell costs, for the time that is left."""
        return self.plan.seconds(self._speed, cell.place["task"], cell.place["n"], cell.mechanism == DENSE)

    @cached_property
    def _speed(self) -> Speed:
        return Speed.of(self.loaded.model)

    @cached_property
    def _windows(self) -> list[Trial]:
        tail = min(TAIL, self.plan.context // 4)
        return windows_cut(self.questions.windows(self.plan.context, self.plan.sizes.windows), tail)

    @cached_property
    def _reference(self) -> Reference:
        return take_reference(self.loaded.model, self._windows, GREEDY)


def _probe(model: Any, variant: Variant, trial: Trial) -> None:
    import torch

    from manyheads.hosts.device import device_of

    def unseen(i: int, logits: Any) -> None:
        pass

    policy: Policy = variant.build()
    parts = [torch.tensor([part], device=device_of(model)) for part in (trial.prefix, trial.tail)]
    try:
        follow(model, policy, parts[0], parts[1], unseen)
    except (MemoryError, RuntimeError):
        return  # a cell of its own says so


class Shown(Progress):
    """A comparison's progress, with the figures of these cells."""

    def told(self, outcome: Mapping[str, Any]) -> str:
        took = f" ({duration(outcome['seconds'])})" if "seconds" in outcome else ""
        if outcome["status"] != "done":
            return f"{outcome['status']}: {outcome['error']}"
        if "accuracy" in outcome:
            return f"{100 * outcome['accuracy']:.0f}% of {outcome['answers']} answers{took}"
        if "bits_per_token" in outcome:
            return f"{outcome['bits_per_token']:.3f} bits per token{took}"
        return f"{outcome['cache_bytes'] / max(1, outcome['dense_cache_bytes']):.0%} of the dense cache's bytes{took}"


def run_study(
    study: Study, out: str | Path, *, retry_failed: bool = False, scheduler: str | None = None
) -> dict[str, Any]:
    """Runs what is not stored in `out` yet, writes report.json and report.html there, and returns the results.

    scheduler: address of a Dask scheduler whose workers run the cells, each on the model as it opens it by its name.
    """
    away = None if scheduler is None else partial(_run_away, Elsewhere.of(study))
    with Store(out) as store:
        store.save_experiment(study.plan.describe(), environment())
        outcomes = run_anywhere(
            study.cells,
            store,
            partial(run_cell, study),
            partial(Shown, weigh=study.weight),
            scheduler=scheduler,
            away=away,
            retry_failed=retry_failed,
        )
        results = {
            "schema": SCHEMA,
            "manyheads": manyheads.__version__,
            "created": now(),
            "environment": environment(),
            "model": _model_facts(study.loaded),
            "variants": [
                {"title": own.title, "policy": own.name, "budget": list(own.budget or ())}
                for own in study.plan.variants
            ],
            "experiment": study.plan.describe(),
            "cells": public(outcomes),
        }
        write_outputs(results, Path(out))
    return results


def run_cell(study: Study, cell: Cell) -> Outcome:
    return {**cell.row, **outcome_of(lambda: study.measure(cell))}


@dataclass(frozen=True)
class Elsewhere:
    """What another machine makes the same study of. plan and text are told apart by the key."""

    key: str
    model: str | None
    dtype: str
    device: str
    plan: Plan = field(compare=False)
    text: str = field(compare=False)
    where: str = field(compare=False)
    turn: tuple[list[int], list[int]] | None = field(compare=False)

    @classmethod
    def of(cls, study: Study) -> Elsewhere:
        keys = " ".join(cell.key for cell in study.cells)
        parameter = next(study.loaded.model.parameters())
        return cls(
            hashlib.sha256(keys.encode()).hexdigest(),
            reopened_as(study.loaded),
            str(parameter.dtype).removeprefix("torch."),
            parameter.device.type,
            study.plan,
            study.questions.text,
            study.questions.where,
            study.questions.turn,
        )


@lru_cache(maxsize=1)
def _opened(place: Elsewhere) -> Study:
    loaded = load_model(place.model, dtype=place.dtype)
    loaded.model.to(place.device)
    return Study(loaded, place.plan, Questions(loaded, text=place.text, where=place.where, turn=place.turn))


def _run_away(place: Elsewhere, cell: Cell) -> Outcome:
    """`run_cell` on another machine."""

    def figures() -> dict[str, Any]:
        study = _opened(place)
        return study.measure(same_here(cell, study.cells))

    return {**cell.row, **outcome_of(figures)}


def _model_facts(loaded: Loaded) -> dict[str, Any]:
    config = loaded.config
    facts: Sequence[str] = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    parameter = next(loaded.model.parameters())
    shown = {name: getattr(config, name) for name in facts if getattr(config, name, None) is not None}
    count = sum(own.numel() for own in loaded.model.parameters())
    return {"name": loaded.name, **shown, "parameters": count, "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type}  # fmt: skip
