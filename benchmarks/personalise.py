"""What losses on attention maps add to fine-tuning a model that draws on a few pictures of two new things.

`python benchmarks/personalise.py [forms] [--model unet]`, `--missing` to go on where a run stopped: four pictures, each
with a faint digit and a barred one (`manyheads.tasks.marked_digits`), and three seeds, each with digits, pictures and
noise of its own. Every form of `manyheads steer personalise` with the weights of its released code, beside plain
fine-tuning of the same parameters on the same batches. A claim shows where the change is beyond twice its standard
error over the seeds; that nothing is lost, where a loss of a twentieth of the drawings is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from common import RESULTS, save
from manyheads.hosts.loading import load_model
from manyheads.steer.personal.form import form, forms
from manyheads.steer.personal.measures import kept, leak
from manyheads.steer.personal.subjects import Album, read_subjects
from manyheads.steer.personal.training import Plan, personalise, with_words
from manyheads.tasks.marked_digits import any_cells, draw_marked, judged, read_marked
from manyheads.tasks.two_digits import CELL, CELLS, SIZE

WRITES = ("personalise", "personalise_unet")
MEASURES = (
    "src/manyheads/steer/personal",
    "src/manyheads/steer/diffusion/word_maps.py",
    "src/manyheads/tasks/marked_digits.py",
    "src/manyheads/bundled/dit",
    "src/manyheads/bundled/unet",
)
SEEDS, PICTURES, DRAWN, DRAWN_STEPS = (0, 1, 2), 4, 24, 10
DIGITS = ((7, 4), (3, 6), (9, 2))
# Rows of the catalogue; of a form whose subjects are things, each begins as its digit, else as the word before it.
NUMBERS = {"disendiff": 17, "attencraft": 202, "mcpl": 222, "dreamtext": 392}
MODIFIED = ("disendiff",)
# By the released margin of 0.1, and by none at all, some picture's first masks are empty and refused: these models'
# maps say less of a thing than Stable Diffusion's. By this one masks overlap a little.
ARGUMENTS: dict[str, dict[str, Any]] = {"attencraft": {"threshold": -0.05}}
# A smaller share of right drawings than this counts as none lost, if the standard error tells it from more.
LOST = 0.05
# Of each claim: its measure, and whether it is to fall.
CLAIMS = {
    "leak": ("the subjects are looked at where they are", "attention outside of their cells", True),
    "right": ("both things are drawn, and nothing else", "share of drawings", False),
    "mixed": ("no thing takes the other's looks", "share of drawings", True),
    "alone": ("one thing is drawn without the other", "share of drawings with it alone", False),
    "kept": ("other captions are drawn as before", "share of drawings right", False),
}


def album(model: Any, name: str, seed: int) -> tuple[Any, Album, list[tuple[int, str]]]:
    """The model with the new words, and the pictures."""
    rng, (one, two) = np.random.default_rng(seed), DIGITS[seed % len(DIGITS)]
    things = [(one, "faint"), (two, "barred")]
    modified = name in MODIFIED
    subjects = read_subjects(model, ["mine=a", "yours=a"] if modified else [f"mine={one}", f"yours={two}"])
    caption = f"mine {one} and yours {two}" if modified else "a mine and a yours"
    pictures, masks = [], {}
    for number in range(PICTURES):
        cells = any_cells(rng)
        pictures.append(draw_marked(things, cells, rng))
        for word, cell in zip(("mine", "yours"), cells, strict=True):
            row, column = CELLS[cell]
            masks[number, word] = torch.zeros(SIZE, SIZE, dtype=torch.bool)
            masks[number, word][row : row + CELL, column : column + CELL] = True
    drawn = torch.from_numpy(np.stack(pictures))[:, None]
    names = tuple(f"{number}.png" for number in range(PICTURES))
    return with_words(model, subjects), Album(drawn, (caption,) * PICTURES, subjects, names, masks), things


def measured(model: Any, own: Album, things: Sequence[tuple[int, str]], seed: int) -> dict[str, float]:
    both = own.captions[0]
    told = read_marked(model.sample([both] * DRAWN, steps=DRAWN_STEPS, seed=seed))
    parts = both.split(" and ")
    alone = read_marked(model.sample([part for part in parts for _ in range(DRAWN // 2)], steps=DRAWN_STEPS, seed=seed))
    single = [thing for thing in things for _ in range(DRAWN // 2)]
    found = judged(told, things)
    return {
        "leak": leak(model, own, seed) or 0.0,
        "right": found["right"],
        "mixed": found["mixed"],
        "alone": statistics.fmean(seen == [thing] for seen, thing in zip(alone, single, strict=True)),
        "kept": kept(model, steps=DRAWN_STEPS, seed=seed) or 0.0,
    }


def claims(model: Any, name: str, steps: int) -> list[dict[str, Any]]:
    chosen, pairs = form(name), []
    arguments = {**chosen.arguments, **ARGUMENTS.get(name, {})}
    for seed in SEEDS:
        base, own, things = album(model, name, seed)
        plan = Plan(steps=steps, seed=seed)
        sides = [personalise(base, own, chosen, how, plan) for how in (chosen.plain(arguments), arguments)]
        pairs.append([measured(side, own, things, seed) for side in sides])
        print(f"{name}, seed {seed}: {pairs[-1]}", flush=True)
    return [row(name, key, [(plain[key], given[key]) for plain, given in pairs]) for key in CLAIMS]


def row(name: str, key: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    claim, measure, falls = CLAIMS[key]
    changes = [given - plain for plain, given in pairs]
    mean, error = statistics.fmean(changes), statistics.stdev(changes) / len(changes) ** 0.5
    gain = -mean if falls else mean
    return {
        "group": name, "row": NUMBERS[name], "claim": claim, "measure": measure, "seeds": len(pairs),
        "plain": statistics.fmean(plain for plain, _ in pairs), "with": statistics.fmean(own for _, own in pairs),
        "standard_error": error, "wanted": "less" if falls else "no less" if key == "kept" else "more",
        "shows": gain - 2 * error > (-LOST if key == "kept" else 0),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("forms", nargs="*", default=[])
    parser.add_argument("--model", choices=["dit", "unet"], default="dit")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--missing", action="store_true", help="go on where a run stopped: forms without rows alone")
    given = parser.parse_args()
    model = load_model(given.model).model
    name = "personalise" if given.model == "dit" else "personalise_unet"
    results, wanted = RESULTS / f"{name}.json", given.forms or [own.name for own in forms()]
    kept_rows = (given.forms or given.missing) and results.exists()
    rows = json.loads(results.read_text())["rows"] if kept_rows else []
    done = {own["group"] for own in rows} if given.missing else set()
    for one in [own for own in wanted if own not in done]:
        rows = [own for own in rows if own["group"] != one] + claims(model, one, given.steps)
        save(name, "cpu", rows)  # after each, so that a run cut short keeps what it has


if __name__ == "__main__":
    main()
