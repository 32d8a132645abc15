"""Handwritten digits among distractors on a canvas of 64 x 64 pixels: named, counted, outlined."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.tasks.digits import CLASSES, split
from manyheads.tasks.draw import distinct, generator, uniform
from manyheads.tasks.task import IGNORED, Batch, Generated, correct, register_task, regrouped, whole

CANVAS, GLYPH, FRAGMENT = 64, 16, 8
MOST = 6  # digits at most, where they are counted
_BRIGHTEST = 16.0


@dataclass(frozen=True, kw_only=True)
class _Canvas(Generated):
    """distractors: pieces of 8 x 8 pixels cut out of digits, strewn over the canvas before the digits are set on it.
    step: digits and distractors stand at multiples of so many pixels."""

    pattern: ClassVar[str] = "grid"
    head: ClassVar[str] = "image-classification"
    patch: int = 4
    distractors: int = 8
    step: int = 1
    eval_examples: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "patch", self.patch, 1, GLYPH, "a digit is 16 pixels wide")
        whole(self, "distractors", self.distractors, 0, 64)
        if self.step not in (1, 2, 4, 8, 16):
            raise ValueError(f"{self.name}: step={self.step!r}; want 1, 2, 4, 8 or 16, as a digit is 16 pixels wide")
        if CANVAS % self.patch:
            raise ValueError(f"{self.name}: patch={self.patch} does not divide {CANVAS}; want 1, 2, 4, 8 or 16")

    @property
    def n(self) -> int:
        return (CANVAS // self.patch) ** 2

    def model_settings(self) -> dict[str, Any]:
        return {"image_size": CANVAS, "patch_size": self.patch, "num_channels": 1, "num_labels": self.classes}

    @property
    def classes(self) -> int:
        return CLASSES

    def sample(self, count: int, rng: Generator) -> Batch:
        return self._draw(count, *_glyphs(False), rng)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        rng, block = generator(self.name, "eval"), 64
        sizes = (min(block, self.eval_examples - start) for start in range(0, self.eval_examples, block))
        return regrouped((self._draw(size, *_glyphs(True), rng) for size in sizes), batch_size)

    @abstractmethod
    def _draw(self, count: int, images: Tensor, labels: Tensor, rng: Generator) -> Batch:
        """`count` examples made of digits images [k, 16, 16] of classes labels [k]."""

    def _strewn(self, count: int, images: Tensor, rng: Generator) -> Tensor:
        """[count, 64, 64] with nothing but distractors."""
        canvas = torch.zeros(count, CANVAS, CANVAS)
        for _ in range(self.distractors):
            which = torch.randint(len(images), (count,), generator=rng)
            cut = uniform(count, 2, 0, GLYPH - FRAGMENT + 1, rng)
            piece = _windows(images[which], cut, FRAGMENT)
            _paste(canvas, piece, self._corner(count, CANVAS - FRAGMENT, rng))
        return canvas

    def _corner(self, count: int, room: int, rng: Generator) -> Tensor:
        """[count, 2] multiples of the step from 0 to `room`."""
        return uniform(count, 2, 0, room // self.step + 1, rng) * self.step

    def _apart(self, count: int, many: int, rng: Generator) -> Iterator[Tensor]:
        """`many` times, in cells of a grid of 3 x 3 of which none is taken twice, a corner [count, 2] for a digit.
        Steps divide a digit's width, so that digits moved back to them do not come to overlap."""
        cells, side = distinct(count, many, 0, 9, rng), CANVAS // 3
        for cell in cells.T:
            inside = uniform(count, 2, 0, side - GLYPH + 1, rng)
            yield (torch.stack([cell // 3, cell % 3], 1) * side + inside) // self.step * self.step


@cache
def _glyphs(evaluates: bool) -> tuple[Tensor, Tensor]:
    """Digits [k, 16, 16] from 0 to 1 and their classes [k]: other ones in training than in the evaluation."""
    images, labels = split()[1 if evaluates else 0]
    return images.float().repeat_interleave(2, 1).repeat_interleave(2, 2) / _BRIGHTEST, labels


def _windows(images: Tensor, corner: Tensor, side: int) -> Tensor:
    """images [b, h, w] -> their [b, side, side] from the corners [b, 2] on."""
    return images[_places(corner, side)]


def _places(corner: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """What picks the squares [b, side, side] from the corners [b, 2] on out of [b, h, w]."""
    rows, columns = (corner[:, axis, None] + torch.arange(side) for axis in (0, 1))
    return torch.arange(len(corner))[:, None, None], rows[:, :, None], columns[:, None, :]


def _paste(canvas: Tensor, pieces: Tensor, corner: Tensor, only: Tensor | None = None) -> None:
    """Adds pieces [b, s, s] at the corners [b, 2], by the larger value; only: of these rows [b]."""
    place = _places(corner, pieces.shape[-1])
    pieces = pieces if only is None else pieces * only[:, None, None]
    canvas[place] = torch.maximum(canvas[place], pieces)


@register_task
@dataclass(frozen=True, kw_only=True)
class Cluttered(_Canvas):
    """Which digit stands among the distractors, at a random place of the canvas? Chance is 0.1. Source of the form: the
    cluttered digits of Mnih et al., arXiv:1406.6247, here of scikit-learn's digits."""

    name: ClassVar[str] = "cluttered"
    title: ClassVar[str] = "A digit among distractors"

    def _draw(self, count: int, images: Tensor, labels: Tensor, rng: Generator) -> Batch:
        canvas = self._strewn(count, images, rng)
        which = torch.randint(len(images), (count,), generator=rng)
        _paste(canvas, images[which], self._corner(count, CANVAS - GLYPH, rng))
        return Batch({"pixel_values": 2 * canvas[:, None] - 1}, labels[which])


@register_task
@dataclass(frozen=True, kw_only=True)
class Counted(_Canvas):
    """How many whole digits stand among the distractors, none to six? Chance is 1/7.

    Digits stand in cells of a grid of 3 x 3, each at a random place in its cell, so that they do not overlap.
    """

    name: ClassVar[str] = "counted"
    title: ClassVar[str] = "How many digits, among distractors"

    @property
    def classes(self) -> int:
        return MOST + 1

    def _draw(self, count: int, images: Tensor, labels: Tensor, rng: Generator) -> Batch:
        canvas = self._strewn(count, images, rng)
        many = torch.randint(MOST + 1, (count,), generator=rng)
        for number, corner in enumerate(self._apart(count, MOST, rng)):
            which = torch.randint(len(images), (count,), generator=rng)
            _paste(canvas, images[which], corner, only=number < many)
        return Batch({"pixel_values": 2 * canvas[:, None] - 1}, many)


@register_task
@dataclass(frozen=True, kw_only=True)
class Segmented(_Canvas):
    """Of every pixel: which digit is it part of, or none? A digit's pixels are those of its square that are not black.

    Four digits among distractors, as in `counted`. Asked is every pixel, and scored are those that belong to a digit:
    background is most of the canvas and easy. Chance is 1/11.
    """

    name: ClassVar[str] = "segmented"
    title: ClassVar[str] = "Which digit each pixel belongs to, among distractors"
    head: ClassVar[str] = "semantic-segmentation"
    metric: ClassVar[str] = "pixel accuracy on digits"
    digits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "digits", self.digits, 1, 9)

    @property
    def classes(self) -> int:
        return CLASSES + 1  # the last is the background

    def _draw(self, count: int, images: Tensor, labels: Tensor, rng: Generator) -> Batch:
        canvas = self._strewn(count, images, rng)
        answers = torch.full((count, CANVAS, CANVAS), CLASSES)
        for corner in self._apart(count, self.digits, rng):
            which = torch.randint(len(images), (count,), generator=rng)
            glyph = images[which]
            _paste(canvas, glyph, corner)
            place = _places(corner, GLYPH)
            answers[place] = torch.where(glyph > 0, labels[which][:, None, None], answers[place])
        return Batch({"pixel_values": 2 * canvas[:, None] - 1}, answers)

    def aligned(self, logits: Tensor) -> Tensor:
        return logits.movedim(1, -1)

    def score(self, logits: Tensor, targets: Tensor) -> tuple[float, int]:
        return correct(*self.asked(logits, torch.where(targets == CLASSES, IGNORED, targets)))
