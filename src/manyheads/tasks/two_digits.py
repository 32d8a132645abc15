"""Pictures of one or two handwritten digits and the captions that say so, for models that draw.

A picture is 16 x 16 pixels from -1 to 1, and has four cells of 8 x 8: left, right, top and bottom, the first two in the
middle of its height, the others in the middle of its width. "a 3 left of a 7" fixes both cells, "a 3 and a 7" takes any
such pair (left and right, or top and bottom, either way round), and "a 3" stands in any cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZE, CELL = 16, 8
# Of each cell, its first row and column.
CELLS = {"left": (4, 0), "right": (4, 8), "top": (0, 4), "bottom": (8, 4)}
# Relation -> the cells of the first and of the second digit.
RELATIONS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
WORDS = ["<start>", "a", *map(str, range(10)), "left", "right", "of", "above", "below", "and"]
NOTHING = 10  # the classifier's answer for a cell that shows no digit
_CAPTION = re.compile(r"a (\d)(?: (left of|right of|above|below|and) a (\d))?")


class Scene(NamedTuple):
    """What a caption asks for: digits in order, and the cell of each, or None where the caption leaves it open."""

    digits: tuple[int, ...]
    cells: tuple[str, ...] | None


def read_caption(caption: str) -> Scene:
    """ValueError for what is no caption of such a scene."""
    found = _CAPTION.fullmatch(caption.strip().lower())
    if found is None:
        raise ValueError(f"{caption!r}: want such as 'a 3 left of a 7', 'a 2 above a 5', 'a 3 and a 7' or 'a 3'")
    first, relation, second = found.groups()
    digits = (int(first),) if second is None else (int(first), int(second))
    return Scene(digits, RELATIONS.get(relation or ""))


def draw_caption(rng: np.random.Generator) -> str:
    """Seven in ten with a relation, fifteen in a hundred each with "and" and with one digit; two digits differ."""
    kind, (first, second) = rng.random(), rng.choice(10, 2, replace=False)
    if kind < 0.15:
        return f"a {first}"
    relation = "and" if kind < 0.3 else list(RELATIONS)[rng.integers(4)]
    return f"a {first} {relation} a {second}"


def draw_scene(caption: str, rng: np.random.Generator, held_out: bool = False) -> np.ndarray:
    """[16, 16], float32 from -1 to 1; held_out: of the digits that no model has been trained on."""
    scene, picture = read_caption(caption), np.full((SIZE, SIZE), -1, np.float32)
    cells = scene.cells
    if cells is None:
        cells = tuple(RELATIONS.values())[rng.integers(4)][: len(scene.digits)]
    for digit, cell in zip(scene.digits, cells, strict=True):
        row, column = CELLS[cell]
        picture[row : row + CELL, column : column + CELL] = glyph(digit, rng, held_out)
    return picture


def batch(rng: np.random.Generator, size: int) -> tuple[Tensor, list[str]]:
    """Pictures [size, 1, 16, 16] and their captions."""
    captions = [draw_caption(rng) for _ in range(size)]
    return torch.from_numpy(np.stack([draw_scene(caption, rng) for caption in captions]))[:, None], captions


def glyph(digit: int, rng: np.random.Generator, held_out: bool = False) -> np.ndarray:
    """One of the digit's images [8, 8] from -1 to 1."""
    pool = _pools()[held_out][digit]
    own: np.ndarray = pool[rng.integers(len(pool))]
    return own


@cache
def _pools() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """By digit, [count, 8, 8] from -1 to 1: every fifth image of a digit is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    by_digit = [data.images[data.target == digit].astype(np.float32) / 8 - 1 for digit in range(10)]
    every = [np.arange(len(own)) % 5 == 0 for own in by_digit]
    return [own[~held] for own, held in zip(by_digit, every, strict=True)], [
        own[held] for own, held in zip(by_digit, every, strict=True)
    ]


# -- what a picture shows ----------------------------------------------------------------------------------------------


def cell_of(pictures: Tensor, cell: str) -> Tensor:
    """[b, 1, 16, 16] -> [b, 8, 8]."""
    row, column = CELLS[cell]
    return pictures[:, 0, row : row + CELL, column : column + CELL]


def reading(pictures: Tensor) -> dict[str, list[int]]:
    """Cell -> the digit that each picture shows there, or NOTHING."""
    return {cell: read_cells(cell_of(pictures, cell).clamp(-1, 1)) for cell in CELLS}


def read_cells(cells: Tensor) -> list[int]:
    """[b, 8, 8] -> the digit that each shows, or NOTHING."""
    return _classifier()(cells)


def shown(pictures: Tensor, captions: Sequence[str]) -> list[dict[str, Any]]:
    """Of each picture: right (every digit of the caption in its place, nothing else), swapped (both there, in each
    other's place), doubled (one of them in both places), cells (what is seen of each pair of places).

    Of a caption that leaves the places open, right and doubled are of the pair of cells that holds more ink.
    """
    seen = reading(pictures)
    found = []
    for number, caption in enumerate(captions):
        scene = read_caption(caption)
        cells = scene.cells or _inked(pictures[number])
        digits = [seen[cell][number] for cell in cells]
        found.append(_judged(scene, digits))
    return found


def _judged(scene: Scene, digits: list[int]) -> dict[str, Any]:
    wanted, open_places = list(scene.digits), scene.cells is None
    if len(wanted) == 1:
        return {"digits": digits, "right": sorted(digits) == sorted([*wanted, NOTHING]), "swapped": False} | {
            "doubled": digits == wanted * 2
        }
    swapped = digits == wanted[::-1]
    return {
        "digits": digits,
        "right": digits == wanted or (open_places and swapped),
        "swapped": swapped and not open_places,
        "doubled": digits[0] == digits[1] and digits[0] in wanted,
    }


def _inked(picture: Tensor) -> tuple[str, str]:
    """The pair of opposite cells, whose outer halves hold more ink."""
    ink = (picture[0] + 1).clamp(0, 2)
    across = ink[4:12, :4].sum() + ink[4:12, 12:].sum()
    down = ink[:4, 4:12].sum() + ink[12:, 4:12].sum()
    return ("left", "right") if across >= down else ("top", "bottom")


@cache
def _classifier() -> Callable[[Tensor], list[int]]:
    """Images [b, 8, 8] -> digits or NOTHING. A support vector machine fitted on the digits that models are trained on,
    and on what shows none: blank cells, the mean of two digits, halves of two digits, a digit moved half a cell."""
    from sklearn.svm import SVC

    rng = np.random.default_rng(0)
    x = np.concatenate(_pools()[0])
    y = np.concatenate([np.full(len(own), digit) for digit, own in enumerate(_pools()[0])])
    machine = SVC(gamma=0.06, C=10).fit(
        np.concatenate([x, _negatives(x, y, rng)]).reshape(-1, CELL * CELL), np.concatenate([y, np.full(800, NOTHING)])
    )
    return lambda images: [int(own) for own in machine.predict(images.flatten(1).double().numpy())]


def _negatives(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[800, 8, 8]."""
    one, two = rng.integers(len(x), size=(2, 4000))
    differ = y[one] != y[two]
    one, two = x[one[differ]], x[two[differ]]
    halves = np.concatenate([one[:, :, :4], two[:, :, 4:]], 2)
    moved = np.concatenate([np.full_like(one[:, :4], -1), one[:, :4]], 1)
    aside = np.concatenate([one[:, :, 4:], np.full_like(one[:, :, :4], -1)], 2)
    blank = rng.uniform(-1.1, -0.7, size=(200, CELL, CELL)).astype(np.float32).clip(-1, 1)
    return np.concatenate(
        [(one[:200] + two[:200]) / 2, halves[200:300], moved[300:400], aside[400:500], blank, halves[500:600].mT]
    )
