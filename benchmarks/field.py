"""The field's own benchmarks, small, by `manyheads compare`: counting, mazes and nucleotides for every causal mechanism
(in-context functions want more steps than a small table has: see `beyond`); scores beyond the trained length; recall
over width and state; gCOG's splits; CAB's seven with their index, in two backbones.

A stopped run goes on where it was; parts that are named run alone, and join the rows that are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from common import here, kept, save
from manyheads.compare.command import as_on_card
from manyheads.compare.composed import compositional
from manyheads.compare.experiment import create_experiment
from manyheads.compare.run import run_experiment
from manyheads.compare.summary import summarise
from manyheads.compare.train import has_place, unpassed
from manyheads.registry import list_attentions
from manyheads.runs.names import parse_name
from manyheads.tasks import Task, create_task, task_class
from manyheads.tasks.cab import CAB
from manyheads.tasks.task import IGNORED

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/shell.py",
    "src/manyheads/softmax.py",
    "src/manyheads/state.py",
    "src/manyheads/functional",
    "src/manyheads/mechanisms",
    "src/manyheads/models",
    "src/manyheads/tasks",
    "src/manyheads/compare",
)

Row = dict[str, Any]
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "heads": 4,
    "layers": 2,
    "intermediate_size": 64,
    "short_conv": 0,
    "positions": "learned",
}
# seconds: what no cell exceeds, so that the whole has an end; a row says which were stopped by it.
TRAINING = {"learning_rates": [0.003], "batch_size": 32, "eval_every": 1000, "seconds": 10.0}
RECALL = {"hidden_size": 64, "heads": 4, "layers": 1, "intermediate_size": 0, "short_conv": 3, "positions": "none"}


def task(name: str, steps: int, model: Mapping[str, Any] = MODEL, **more: Any) -> dict[str, Any]:
    own = {
        key: more.pop(key) for key in ("batch_size", "beyond", "learning_rates", "eval_every", "seconds") if key in more
    }
    return {"name": name, "model": dict(model), "training": {**TRAINING, "steps": steps, **own}, **more}


CAUSAL = {
    "counting": task("counting", 200, eval_examples=256),
    "maze": task("maze", 200, size=3, eval_examples=128),
    "nucleotides": task("nucleotides", 60, RECALL | {"layers": 2}, n=128, batch_size=16, eval_examples=32),
}
BEYOND = {
    "recall": task("recall", 300, RECALL, n=64, vocabulary=128, pairs=8, eval_examples=128, beyond=[2, 4],
                   learning_rates=[0.005], eval_every=50, seconds=30.0),
    "functions": task("functions", 200, MODEL | {"positions": "rotary"}, kind="conjunction", bits=4, points=10,
                      eval_examples=128, beyond=[2, 4]),
}  # fmt: skip
LONGER = (
    *("softmax", "based", "hedgehog", "flow", "lightning", "transnormerllm", "mega", "h3[taps=4]", "aaren"),
    *(
        "mswa[window=16]",
        "moba[block=16,top_k=2]",
        "titans",
        "music-transformer[max_distance=32]",
        "shaw",
        "rcmha",
        "entmax",
    ),
)
WIDTHS = (16, 32, 64)
STATES = ("softmax", "gqa", "based", "hedgehog", "lightning", "mswa[window=16]")
WIDE = task("recall", 250, n=64, vocabulary=128, pairs=12, eval_examples=128, learning_rates=[0.005], eval_every=50)
SPLITS = ("iid", "distractors", "systematic", "systematic-tree", "productive")
READERS = ("softmax", "hedgehog", "agent")
GCOG = task("gcog", 150, batch_size=16, eval_examples=256)
CONTESTANTS = ("softmax", "mqa", "hedgehog", "flow")
# So many steps each that somebody leaves the trivial answer behind: an index over noise would rank nobody.
SEVEN = {
    "masked-text": {"steps": 300, "n": 64, "eval_windows": 64},
    "super-resolution": {"steps": 120},
    "text": {"steps": 200, "n": 64, "eval_windows": 64},
    "recall": {"steps": 300, "n": 64, "vocabulary": 128, "eval_examples": 128},
    "forecast": {"steps": 300, "n": 32, "horizon": 8, "waves": 1, "levels": 32, "eval_examples": 128},
    "completion": {"steps": 120, "eval_examples": 128},
    "transduce": {"steps": 200, "n": 12, "eval_examples": 128},
}
LEARNT: dict[str, Any] = {"learning_rates": [0.005], "seconds": 60.0}
BEST, SEEDS = 5, 3


def causal(out: Path) -> Iterator[Row]:
    """Every causal mechanism once; the best of each task from more seeds."""
    for name, entry in CAUSAL.items():
        names = [own for own in list_attentions() if has_place(task_class(name), own) and not unpassed(own)]
        cells = trained([as_on_card(own) for own in names], [entry], [0], out / name)
        scored = [cell for cell in cells if cell.get("value") is not None]
        scored.sort(key=lambda cell: cell["value"], reverse=bool(scored) and scored[0]["higher_is_better"])
        best = [parse_name(cell["mechanism"]) for cell in scored[:BEST]]
        more = trained(best, [entry], list(range(1, SEEDS)), out / f"{name}-seeds") if best else []
        floor = trivial(create_task(name, **arguments_of(entry)))
        yield from rows_of("causal", name, [*cells, *more], trivial=floor)


def beyond(out: Path) -> Iterator[Row]:
    """Models trained at one length, scored there and at two and four times it."""
    for name, entry in BEYOND.items():
        cells = trained([parse_name(own) for own in LONGER], [entry], [0], out / name)
        made = create_task(name, **arguments_of(entry))
        yield from rows_of("beyond", f"{name}, n {made.n} (trained)", cells, trivial=trivial(made))
        for times in entry["training"]["beyond"]:
            longer = made.longer(times)
            points = [
                {**cell, **point, "steps": cell["steps"]}
                for cell in cells
                for point in cell.get("beyond") or ()
                if point["times"] == times
            ]
            yield from rows_of("beyond", f"{name}, n {longer.n}", points, trivial=trivial(longer))


def recall(out: Path) -> Iterator[Row]:
    """Multi-query recall over the width of the model; a row holds the bytes that its state takes."""
    for width in WIDTHS:
        entry = WIDE | {"model": RECALL | {"hidden_size": width}}
        cells = trained([parse_name(own) for own in STATES], [entry], [0], out / str(width))
        yield from rows_of(
            "recall", f"width {width}", cells, trivial=trivial(create_task("recall", **arguments_of(entry)))
        )


def gcog(out: Path) -> Iterator[Row]:
    for split in SPLITS:
        entry = GCOG | {"split": split, "depth": 5} | ({"distractors": 20} if split == "distractors" else {})
        cells = trained([parse_name(own) for own in READERS], [entry], [0], out / split)
        yield from rows_of("gcog", split, cells, trivial=trivial(create_task("gcog", **arguments_of(entry))))


def cab(out: Path, part: str = "cab", model: dict[str, Any] = MODEL) -> Iterator[Row]:
    """The seven tasks in four patterns, and the index over them: of each seed, then the mean."""
    names = [one for own in CAB.values() for one in own]
    models = {"recall": model | {"short_conv": 3, "positions": "none"}}
    entries = [task(one, model=models.get(one, model), **SEVEN[one], **LEARNT) for one in names]
    results = run(([parse_name(own) for own in CONTESTANTS], entries, list(range(SEEDS))), out)
    for entry in entries:
        own = [cell for cell in results["cells"] if cell["task"].split("[")[0] == entry["name"]]
        floor = trivial(create_task(entry["name"], **arguments_of(entry)))
        yield from rows_of(part, entry["name"], own, trivial=floor)
    yield from indices(part, results)


def wide(out: Path) -> Iterator[Row]:
    """The same in another backbone."""
    return cab(out, "cab-wide", MODEL | {"hidden_size": 64, "layers": 1, "intermediate_size": 128})


def indices(part: str, results: Mapping[str, Any]) -> Iterator[Row]:
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(SEEDS):
        cells = [cell for cell in results["cells"] if cell["seed"] == seed]
        for name, own in compositional(summarise({**results, "cells": cells})).items():
            for which, value in own.items():
                found.setdefault((name, which), []).append(value)
    for (name, which), values in found.items():
        yield {"part": part, "mechanism": name, "column": f"index, {which}", "metric": "index",
               "higher_is_better": True, "value": mean(values), "seeds": len(values),
               "value_error": stdev(values) if len(values) > 1 else None}  # fmt: skip


PARTS = {"causal": causal, "beyond": beyond, "recall": recall, "gcog": gcog, "cab": cab, "cab-wide": wide}


def arguments_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("name", "model", "training")}


def run(given: tuple[list[Any], list[Any], list[int]], out: Path) -> dict[str, Any]:
    mechanisms, tasks, seeds = given
    changes = {"mechanisms": mechanisms, "tasks": tasks, "seeds": seeds, "sections": ["quality"]}
    return run_experiment(create_experiment(changes), out)


def trained(mechanisms: list[Any], tasks: list[Any], seeds: list[int], out: Path) -> list[Row]:
    cells: list[Row] = run((mechanisms, tasks, seeds), out)["cells"]
    return cells


def rows_of(part: str, column: str, cells: list[Row], *, trivial: float) -> Iterator[Row]:
    """One per mechanism: the mean over its seeds, with their spread; from one seed, with the error of the test set."""
    groups: dict[str, list[Row]] = {}
    for cell in cells:
        groups.setdefault(cell["mechanism"], []).append(cell)
    for name, own in groups.items():
        done = [cell for cell in own if cell.get("value") is not None]
        row = {"part": part, "mechanism": name, "column": column, "trivial": trivial}
        if not done:
            yield {**row, "value": None, "error": own[0].get("error") or "failed"}
            continue
        values = [cell["value"] for cell in done]
        held = {"state_bytes": done[0]["model_state_bytes"]} if done[0].get("model_state_bytes") else {}
        yield {
            **row,
            **{key: done[0].get(key) for key in ("n", "metric", "higher_is_better", "parameters", "steps")},
            "value": mean(values),
            "value_error": stdev(values) if len(values) > 1 else done[0].get("value_error"),
            "seeds": len(values),
            "in_time": not any(str(cell.get("stopped", "")).startswith("after") for cell in done),
            **held,
        }


def trivial(made: Task) -> float:
    """The metric of who answers every question alike, as often as each answer is right."""
    batches = list(made.eval_batches(64))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    counts = torch.bincount(targets[targets != IGNORED]).float()
    logits = (counts / counts.sum()).clamp(min=1e-9).log()
    scored = [made.score(logits.expand(*batch.targets.shape, -1), batch.targets) for batch in batches]
    return sum(value for value, _ in scored) / sum(count for _, count in scored)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without it")
    parser.add_argument("--out", type=Path, default=Path("runs/field"), help="stored cells: a stopped run goes on")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; want some of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    rows, now = kept("field"), here()
    for name in arguments.parts or PARTS:
        order = list(PARTS)
        rows = [row for row in rows if row["part"] != name]
        for row in PARTS[name](arguments.out / name):  # a task at a time: what is stopped keeps those that were done
            rows.append({**row, **now})
            save("field", "cpu", sorted(rows, key=lambda row: order.index(row["part"])), tell=False)
        save("field", "cpu", sorted(rows, key=lambda row: order.index(row["part"])))


if __name__ == "__main__":
    main()
