"""The compositional index of CAB (arXiv:2210.07661): one figure over tasks whose metrics have no common unit.

Of each task, z = +-(x - mean) / deviation over the mechanisms of this run that finished it, so that more is better;
of a pattern, the mean over its tasks, and of all, the mean over all seven. Mean and deviation are of the run: the
paper's own are frozen from its runs, and of other tasks. A mechanism without one of the tasks has no figure where it is
missing, whereas the paper's script averages over what is there, which flatters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from manyheads.tasks.cab import CAB

LEAST = 3  # mechanisms that a deviation is taken over
ALL = "all seven"


def compositional(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By mechanism, its index over each of CAB's patterns and over all, where it has one; rows as `summarise` gives
    them. Empty where the tasks are not CAB's seven, each once."""
    tasks = {task.split(",")[0]: task for row in rows for task in row["quality"]}
    whole = {task for tasks_of in CAB.values() for task in tasks_of}
    if not whole <= tasks.keys() or any(len(row["quality"]) < len(whole) for row in rows):
        return {}
    scores = {task: _standardised(rows, tasks[task]) for task in whole}
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        name = row["mechanism"]
        for pattern, own in (*CAB.items(), (ALL, tuple(whole))):
            if all(name in scores[task] for task in own):
                found.setdefault(name, {})[pattern] = mean(scores[task][name] for task in own)
    return found


def _standardised(rows: Sequence[Mapping[str, Any]], task: str) -> dict[str, float]:
    known = {row["mechanism"]: row["quality"][task] for row in rows if row["quality"][task]["mean"] is not None}
    if len(known) < LEAST:
        return {}
    values = [own["mean"] for own in known.values()]
    middle, spread = mean(values), stdev(values)
    signs = {name: 1 if own["higher_is_better"] else -1 for name, own in known.items()}
    return {name: signs[name] * (own["mean"] - middle) / spread if spread else 0.0 for name, own in known.items()}
