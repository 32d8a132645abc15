"""Canvases of digits among distractors, by `manyheads compare`'s own trainer: mechanisms that see windows, or their
convolution's reach, beside mechanisms that see the whole image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from common import save
from manyheads.compare.command import changes_of
from manyheads.compare.experiment import create_experiment, preset
from manyheads.compare.run import run_experiment
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

# What a cell can see in one layer, on maps of 8 x 8 cells: of 4 x 4 around it or less, or all of them.
NAMES = {
    "softmax": "all",
    "twins-local[window=4]": "windows",
    "mambaout[kernel=3]": "convolution",
    "agent": "all",
    "neighborhood-grid[window=3]": "windows",
    "focal-modulation[window=3,levels=2]": "convolution and a mean",
    "halonet[block=2,halo=1]": "windows",
    "hilo[window=2]": "windows and all",
    "large-kernel-attention": "convolution",
    "maxvit-block[window=4]": "windows",
    "twins-global[reduce=2]": "all",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/canvases"), help="stored cells: a stopped run goes on")
    parser.add_argument("tasks", nargs="*", default=["cluttered"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {name: {"mechanism": name, "sees": NAMES[name]} for name in NAMES}
    for task in arguments.tasks:
        changes = changes_of({}, list(NAMES), tasks=[task], seeds="1", sections=["quality"])
        changes["mechanisms"] = [parse_name(name) for name in NAMES]
        for cell in run_experiment(create_experiment(changes), arguments.out / task)["cells"]:
            row = found[_named(cell["mechanism"])]
            row |= {task: cell.get("value"), f"{task}_error": cell.get("value_error")}
            row |= {"parameters": cell.get("parameters"), f"{task}_seconds": cell.get("train_seconds")}
            row |= {"error": cell["error"]} if cell["error"] else {}
    steps = {task: preset("quick")["recipes"][task]["training"]["steps"] for task in arguments.tasks}
    save("canvases", "cpu", [{**row, "steps": steps} for row in found.values()])


def _named(label: str) -> str:
    """The name in the list above of a cell's mechanism, whose arguments are in alphabetical order."""
    return next(name for name in NAMES if parse_name(name) == parse_name(label))


if __name__ == "__main__":
    main()
