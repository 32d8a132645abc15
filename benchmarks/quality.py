"""Every mechanism that the quick recall and the quick digits have a place for, by `manyheads compare`'s own trainer.

What stays below the target is trained once more with five times the steps: has it not learnt yet, or can it not?
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from common import save
from manyheads.card import Pattern
from manyheads.compare.command import as_on_card, changes_of
from manyheads.compare.experiment import create_experiment, preset
from manyheads.compare.run import run_experiment
from manyheads.compare.train import has_place
from manyheads.registry import list_attentions, mechanism_class
from manyheads.tasks import task_class

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/finite.py",
    "src/manyheads/shell.py",
    "src/manyheads/softmax.py",
    "src/manyheads/state.py",
    "src/manyheads/functional",
    "src/manyheads/mechanisms",
    "src/manyheads/models",
    "src/manyheads/tasks",
    "src/manyheads/compare",
)
WRITES = ("recall", "digits")

# Digits are a grid only for what has no other form: patches in a row serve all the others.
TASKS = {"recall": ["recall"], "digits": ["digits-patches", "digits-grid"]}
TARGETS = {"recall": 0.95, "digits": 0.9}
LONGER = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=sorted(TASKS))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="stored cells: a stopped run goes on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    what, rows, seen = arguments.what, [], set()
    for task in TASKS[what]:
        names = [name for name in list_attentions() if has_place(task_class(task), name) and name not in seen]
        seen |= set(names)
        found = accuracies(task, names, arguments.out / task)
        low = [row["mechanism"].split("[")[0] for row in found if (row["accuracy"] or 0.0) < TARGETS[what]]
        steps = preset("quick")["recipes"][task]["training"]["steps"]
        longer = accuracies(task, low, arguments.out / f"{task}-longer", steps=LONGER * steps) if low else []
        later = {row["mechanism"]: row["accuracy"] for row in longer}
        for row in found:
            more = {"longer": later[row["mechanism"]]} if row["mechanism"] in later else {}
            rows.append({**row, "target": TARGETS[what], "steps": steps, **more})
    save(what, "cpu", sorted(rows, key=lambda row: -(row["accuracy"] or 0.0)))


def accuracies(task: str, names: list[str], out: Path, steps: int | None = None) -> list[dict[str, Any]]:
    """One row per mechanism, with the arguments that the quick preset gives it, if any."""
    changes = changes_of({}, names, tasks=[task], seeds="1", sections=["quality"])
    changes["mechanisms"] = [as_on_card(entry) for entry in changes["mechanisms"]]
    if steps:
        changes["training"] = {"steps": steps, "stop_at": TARGETS[task.split("-")[0]]}
    cells = run_experiment(create_experiment(changes), out)["cells"]
    return [
        {
            "mechanism": cell["mechanism"],
            "task": task,
            "pattern": pattern_of(task, cell["mechanism"]),
            "accuracy": cell.get("value"),
            "parameters": cell.get("parameters"),
            **({"error": cell["error"]} if cell["error"] else {}),
        }
        for cell in cells
    ]


def pattern_of(task: str, label: str) -> str:
    """As what the mechanism was used: the pattern of the task, or what stands in for it."""
    patterns = mechanism_class(label.split("[")[0]).card.patterns
    wanted = [task_class(task).pattern, Pattern.NONCAUSAL_SELF, Pattern.POOL]
    return str(next(pattern for pattern in wanted if pattern in patterns))


if __name__ == "__main__":
    main()
