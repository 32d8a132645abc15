"""Digits that no model here has drawn, to teach one: faint ones, and barred ones, in scenes of two.

A faint digit has half the light of its own; a barred one a white bar at its left, where scikit-learn's digits are
blank. Both are digits still, so that a model that knows digits knows what they are of, and neither is ever taken for a
plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from manyheads.tasks.two_digits import CELL, CELLS, NOTHING, RELATIONS, SIZE, cell_of, glyph, read_cells

MARKS = ("plain", "faint", "barred")
# Of the 2 from black to white: a faint digit's brightest pixel lies at 0, a plain one's near 1.
BRIGHT, BAR = 0.4, 0.0


def marked(own: np.ndarray, mark: str) -> np.ndarray:
    """A digit [8, 8] from -1 to 1 with a mark; ValueError for another one."""
    if mark not in MARKS:
        raise ValueError(f"mark {mark!r}: want one of {', '.join(MARKS)}")
    made = (own + 1) / 2 - 1 if mark == "faint" else own.copy()
    if mark == "barred":
        made[:, 0] = 1
    return made


def draw_marked(
    things: Sequence[tuple[int, str]], cells: Sequence[str], rng: np.random.Generator, held_out: bool = False
) -> np.ndarray:
    """[16, 16], float32 from -1 to 1: of each thing (digit, mark) one in its cell."""
    picture = np.full((SIZE, SIZE), -1, np.float32)
    for (digit, mark), cell in zip(things, cells, strict=True):
        row, column = CELLS[cell]
        picture[row : row + CELL, column : column + CELL] = marked(glyph(digit, rng, held_out), mark)
    return picture


def any_cells(rng: np.random.Generator) -> tuple[str, str]:
    """Two opposite ones."""
    return list(RELATIONS.values())[rng.integers(len(RELATIONS))]


def read_marked(pictures: Tensor) -> list[list[tuple[int, str]]]:
    """Of each picture, the digits that stand in the pair of opposite cells which shows more of them, in order of the
    cells, each with its mark."""
    seen = {cell: _read(cell_of(pictures, cell).clamp(-1, 1)) for cell in CELLS}
    found = []
    for number in range(len(pictures)):
        pairs = [[seen[cell][number] for cell in pair] for pair in (RELATIONS["left of"], RELATIONS["above"])]
        best = max(pairs, key=lambda pair: sum(digit != NOTHING for digit, _ in pair))
        found.append([thing for thing in best if thing[0] != NOTHING])
    return found


def _read(cells: Tensor) -> list[tuple[int, str]]:
    """[b, 8, 8]."""
    bars = cells[:, :, 0].mean(-1) > BAR
    bare = cells.clone()
    bare[:, :, 0] = -1
    light = bare.flatten(1).topk(4).values.mean(-1)
    faint = light < BRIGHT
    bare[faint] = (2 * (bare[faint] + 1) - 1).clamp(-1, 1)
    marks = ["barred" if bar else "faint" if dim else "plain" for bar, dim in zip(bars, faint, strict=True)]
    return list(zip(read_cells(bare), marks, strict=True))


def judged(seen: Sequence[Sequence[tuple[int, str]]], things: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Shares of the pictures: right (all things and nothing else), there (of the things, each counted), mixed (a digit
    of the things with another's mark)."""
    marks = {digit: {own for other, own in things if other != digit} - {"plain"} for digit, _ in things}
    count = max(1, len(seen))
    return {
        "right": sum(sorted(own) == sorted(things) for own in seen) / count,
        "there": sum(thing in own for own in seen for thing in things) / (count * len(things)),
        "mixed": sum(any(mark in marks.get(digit, ()) for digit, mark in own) for own in seen) / count,
    }
