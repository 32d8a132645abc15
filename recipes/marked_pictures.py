"""Pictures to personalise a model that draws with: `python recipes/marked_pictures.py --out DIR`.

A faint 7 and a barred 4 stand together in each, as in no picture that the packaged models have seen
(`manyheads.tasks.marked_digits`); beside each picture its caption, and a mask of either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from manyheads.tasks.marked_digits import any_cells, draw_marked
from manyheads.tasks.two_digits import CELL, CELLS, SIZE

THINGS = ((7, "faint"), (4, "barred"))


def mask_of(cell: str) -> np.ndarray:
    row, column = CELLS[cell]
    made = np.zeros((SIZE, SIZE), np.uint8)
    made[row : row + CELL, column : column + CELL] = 255
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of a faint 7 and a barred 4, with captions and masks.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--caption", default="mine 7 and yours 4")
    parser.add_argument("--words", nargs=2, default=["mine", "yours"], help="the first and the second subject")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(given.seed)
    for number in range(given.count):
        cells = any_cells(rng)
        picture = draw_marked(THINGS, cells, rng)
        Image.fromarray(((picture + 1) * 127.5).round().astype(np.uint8)).save(given.out / f"{number}.png")
        (given.out / f"{number}.txt").write_text(given.caption + "\n", encoding="utf-8")
        for word, cell in zip(given.words, cells, strict=True):
            Image.fromarray(mask_of(cell)).save(given.out / f"{number}.{word}.png")


if __name__ == "__main__":
    main()
