"""Tasks over edges and of sets, by `manyheads compare`: communities under noise, what stands across a ring, where
digits are. Those that go along edges or see windows stand beside those that see everything."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from common import save
from manyheads.compare.command import changes_of
from manyheads.compare.experiment import create_experiment, preset
from manyheads.compare.run import run_experiment
from manyheads.runs.names import parse_name

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/softmax.py",
    "src/manyheads/functional/edges.py",
    "src/manyheads/functional/box_sets.py",
    "src/manyheads/functional/grid_windows.py",
    "src/manyheads/mechanisms/graph",
    "src/manyheads/models/graphs.py",
    "src/manyheads/models/detection.py",
    "src/manyheads/tasks/graphs.py",
    "src/manyheads/tasks/located.py",
    "src/manyheads/compare",
)

ALONG, ALL, WINDOWS = "edges", "all", "windows"
GRAPHS = {
    "supergat": ALONG,
    "supergat[form=sd]": ALONG,
    "relation-aware": ALONG,
    "graph-layout": ALONG,
    "softmax": ALL,
}
# What a cell can see in one layer, of 8 x 8 patches.
GRIDS = {
    "softmax": ALL,
    "agent": ALL,
    "vision-rwkv": ALL,
    "twins-local[window=4]": WINDOWS,
    "neighborhood-grid[window=3]": WINDOWS,
    "halonet[block=2,halo=1]": WINDOWS,
    "mambaout[kernel=3]": "convolution",
}
TASKS = {"communities": GRAPHS, "far-away": GRAPHS, "locate": GRIDS}
CHANCE = {"communities": 0.25, "far-away": 0.25, "locate": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/relations"), help="stored cells: a stopped run goes on")
    parser.add_argument("--seeds", default="2", help="how many of each, or which: 2, or 0,7")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", nargs="*", help="of the mechanisms listed here, these; results are written of all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for task in arguments.tasks:
        for name, sees in TASKS[task].items():
            if arguments.only and name not in arguments.only:
                continue
            changes = changes_of({}, tasks=[task], seeds=arguments.seeds, sections=["quality"])
            changes |= {"mechanisms": [parse_name(name)]}
            cells = run_experiment(create_experiment(changes), arguments.out / task / _folder(name))["cells"]
            rows.append(row(task, name, sees, cells))
            print(rows[-1], flush=True)
    if arguments.only or set(arguments.tasks) != set(TASKS):
        print("not written: a part of what benchmarks/results/relations.json holds")
        return
    save("relations", "cpu", rows)


def _folder(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def row(task: str, name: str, sees: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    values = [cell["value"] for cell in cells if cell.get("value") is not None]
    shared = {"task": task, "mechanism": name, "sees": sees, "chance": CHANCE[task]}
    if not values:
        return {**shared, "value": None, "error": cells[0]["error"]}
    return {
        **shared,
        "value": mean(values),
        "value_error": stdev(values) if len(values) > 1 else cells[0]["value_error"],
        "seeds": len(values),
        "parameters": cells[0]["parameters"],
        "seconds": mean(cell["train_seconds"] for cell in cells),
        "steps": preset("quick")["recipes"][task]["training"]["steps"],
    }


if __name__ == "__main__":
    main()
