"""Canvases of digits among distractors, by `manyheads compare`: every mechanism of the pattern grid,
those that see windows, or their convolution's reach, beside those that see all; the best with three seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from common import save
from manyheads.card import Pattern
from manyheads.compare.command import as_on_card, changes_of
from manyheads.compare.experiment import create_experiment, preset
from manyheads.compare.run import run_experiment
from manyheads.registry import list_attentions
from manyheads.runs.names import parse_name

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/shell.py",
    "src/manyheads/softmax.py",
    "src/manyheads/functional/grid_windows.py",
    "src/manyheads/functional/cells.py",
    "src/manyheads/mechanisms/grid",
    "src/manyheads/mechanisms/convolution",
    "src/manyheads/models/images.py",
    "src/manyheads/models/layers.py",
    "src/manyheads/tasks/cluttered.py",
    "src/manyheads/compare",
)

# What a cell can see in one layer, on maps of 8 x 8 cells, with arguments that make the difference on so small a map;
# every other mechanism has its defaults, whose windows may hold all of it.
SEES = {
    "softmax": "all",
    "twins-local[window=4]": "windows",
    "mambaout[kernel=3]": "convolution",
    "agent": "all",
    "neighborhood-grid[window=3]": "windows",
    "focal-modulation[window=3,levels=2]": "convolution and a mean",
    "halonet[block=2,halo=1]": "windows",
    "hilo[window=2]": "windows and all",
}


SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/canvases"), help="stored cells: a stopped run goes on")
    parser.add_argument("--best", type=int, default=10, help="how many of the best are trained from more seeds")
    parser.add_argument("--only", nargs="*", help="mechanisms, with arguments; otherwise every one of the pattern grid")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = [parse_name(name) for name in arguments.only or SEES]
    if not arguments.only:
        named = {name.split("[")[0] for name in SEES}
        others, asked = list_attentions(pattern=Pattern.GRID), preset("quick").get("arguments", {})
        others = [name for name in others if name not in named]
        given += [{"name": name, **asked[name]} if name in asked else as_on_card(name) for name in others]
    cells = accuracies(given, "1", arguments.out)
    learnt = sorted((label for label in cells if cells[label][0].get("value")), key=lambda one: -cells[one][0]["value"])
    best = [parse_name(label) for label in learnt[: arguments.best]]
    if best:
        cells |= accuracies(best, str(SEEDS), arguments.out / "seeds")
    steps = preset("quick")["recipes"]["cluttered"]["training"]["steps"]
    save("canvases", "cpu", [row(label, found, steps) for label, found in cells.items()])


def accuracies(given: list[Any], seeds: str, out: Path) -> dict[str, list[dict[str, Any]]]:
    """The cells of each mechanism, one per seed, under its label."""
    changes = changes_of({}, tasks=["cluttered"], seeds=seeds, sections=["quality"]) | {"mechanisms": given}
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in run_experiment(create_experiment(changes), out)["cells"]:
        found.setdefault(cell["mechanism"], []).append(cell)
    return found


def row(label: str, cells: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The mean over seeds, with their spread; from one seed, with the error of the test set."""
    values = [cell["value"] for cell in cells if cell.get("value") is not None]
    if not values:
        return {"mechanism": label, "accuracy": None, "error": cells[0]["error"], "parameters": None}
    return {
        "mechanism": label,
        "sees": SEES.get(_named(label), ""),
        "accuracy": mean(values),
        "accuracy_error": stdev(values) if len(values) > 1 else cells[0]["value_error"],
        "seeds": len(values),
        "parameters": cells[0]["parameters"],
        "seconds": mean(cell["train_seconds"] for cell in cells),
        "steps": steps,
    }


def _named(label: str) -> str:
    """The name in the list above of a cell's mechanism, whose arguments are in alphabetical order."""
    return next((name for name in SEES if parse_name(name) == parse_name(label)), label)


if __name__ == "__main__":
    main()
