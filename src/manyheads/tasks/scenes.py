"""Pictures of handwritten digits on a grid, and what can be asked of them: how many, where, whether, which.

A picture is 40 x 40 pixels in 4 x 4 cells of 10; 1 to 5 cells hold one of scikit-learn's 8 x 8 digits, up to two pixels
off the cell's corner. Digits come in pairs (a 3 nearly always with an 8, left of it in the same row), and some pairs
more often than others: a text prior, which is right for `paired` scenes and misleads elsewhere, the more the noisier
the picture is. Training glyphs and held-out glyphs are those of `manyheads.tasks.digits`.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from manyheads.tasks.digits import CLASSES, LEVELS, SIDE, split
from manyheads.tasks.draw import generator

GRID, CELL, CANVAS, MOST = 4, 10, 40, 5
# Who comes with whom, left one first, from the commonest pair to the rarest.
PAIRS = ((3, 8), (1, 7), (4, 9), (5, 6), (2, 0))
WEIGHTS = (0.3, 0.25, 0.2, 0.15, 0.1)
PARTNER = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}
TOGETHER, IN_A_ROW = 0.85, 0.6
KINDS = ("caption", "count", "count-digit", "left", "exists")
NOTHING = "nothing"


@dataclass(frozen=True)
class Scene:
    """places: (row, column, digit) of each digit, in reading order."""

    places: tuple[tuple[int, int, int], ...]

    @property
    def digits(self) -> tuple[int, ...]:
        return tuple(digit for _, _, digit in self.places)

    def count(self, digit: int | None = None) -> int:
        """How many digits, or how many times this one."""
        return len(self.places) if digit is None else self.digits.count(digit)

    def left_of(self, digit: int) -> int | None:
        """The next digit to the left in the row of the only `digit`; None where there is none. ValueError where the
        digit is not there exactly once: then the question means nothing, or several."""
        where = [(row, column) for row, column, own in self.places if own == digit]
        if len(where) != 1:
            raise ValueError(f"{_a(digit)} is {len(where)} times in the scene; left_of wants it once")
        row, column = where[0]
        left = [(other, own) for line, other, own in self.places if line == row and other < column]
        return max(left)[1] if left else None


@dataclass(frozen=True)
class Question:
    """kind: one of KINDS. about: the digit that is asked for, if there is one."""

    kind: str
    text: str
    answer: str
    about: int | None = None


def _a(digit: int) -> str:
    return f"an {digit}" if digit == 8 else f"a {digit}"


def caption(scene: Scene) -> Question:
    return Question("caption", "Which digits?", ", ".join(map(str, scene.digits)))


def count(scene: Scene, digit: int | None = None) -> Question:
    if digit is None:
        return Question("count", "How many digits?", str(scene.count()))
    return Question("count-digit", f"How many {digit}s?", str(scene.count(digit)), digit)


def left(scene: Scene, digit: int) -> Question:
    found = scene.left_of(digit)
    return Question("left", f"What is left of the {digit}?", NOTHING if found is None else str(found), digit)


def exists(scene: Scene, digit: int) -> Question:
    return Question("exists", f"Is there {_a(digit)}?", "yes" if scene.count(digit) else "no", digit)


def draw_scene(rng: random.Random, *, paired: bool = True) -> Scene:
    """paired: digits come in the pairs of PAIRS, as in training; else every digit is as likely as any other, wherever
    it lies."""
    size = rng.randint(1, MOST)
    taken: dict[tuple[int, int], int] = {}
    while len(taken) < size:
        if not paired:
            taken[_free(rng, taken)] = rng.randrange(CLASSES)
            continue
        one, other = pair = rng.choices(PAIRS, WEIGHTS)[0]
        if size - len(taken) < 2 or rng.random() > TOGETHER:
            taken[_free(rng, taken)] = rng.choice(pair)
            continue
        first, second = _free(rng, taken), _free(rng, taken)
        row = [column for column in range(GRID) if (first[0], column) not in taken]
        if len(row) > 1 and rng.random() < IN_A_ROW:
            here, there = sorted(rng.sample(row, 2))
            first, second = (first[0], here), (first[0], there)
        while second == first:
            second = _free(rng, taken)
        taken[first], taken[second] = one, other
    return Scene(tuple((*place, digit) for place, digit in sorted(taken.items())))


def _free(rng: random.Random, taken: dict[tuple[int, int], int]) -> tuple[int, int]:
    """A cell where nothing is."""
    return rng.choice([(i, j) for i in range(GRID) for j in range(GRID) if (i, j) not in taken])


def ask(scene: Scene, kind: str, rng: random.Random) -> Question:
    """A question of the kind, about the digit that makes half of the answers yes, or some digit that is there."""
    there = sorted(set(scene.digits))
    absent = [digit for digit in range(CLASSES) if digit not in there]
    once = [digit for digit, number in Counter(scene.digits).items() if number == 1]
    if kind == "caption":
        return caption(scene)
    if kind == "count" or (kind == "left" and not once):
        return count(scene)
    if kind == "left":
        behind = [digit for digit in once if scene.left_of(digit) is not None]
        return left(scene, rng.choice(behind if behind and rng.random() < 0.6 else once))
    asked = rng.choice(there if rng.random() < (0.75 if kind == "count-digit" else 0.5) else absent)
    return (count if kind == "count-digit" else exists)(scene, asked)


def render(scenes: Sequence[Scene], rng: Generator, *, noise: float | Tensor = 0.0, held: bool = False) -> Tensor:
    """[b, 40, 40] in 0 to 1, in steps of 1/255 as in a picture's file. noise: standard deviation of what is added to
    every pixel, one for all or [b]. held: with the glyphs that are kept for the evaluation."""
    images, labels = split()[held]
    glyphs = [images[labels == digit] for digit in range(CLASSES)]
    pixels = torch.zeros(len(scenes), CANVAS, CANVAS)
    for canvas, scene in zip(pixels, scenes, strict=True):
        for row, column, digit in scene.places:
            own = glyphs[digit]
            glyph = own[int(torch.randint(len(own), (1,), generator=rng))] / (LEVELS - 1)
            down, right = torch.randint(CELL - SIDE + 1, (2,), generator=rng).tolist()
            top, start = row * CELL + down, column * CELL + right
            canvas[top : top + SIDE, start : start + SIDE] = glyph
    spread = torch.as_tensor(noise, dtype=torch.float32).expand(len(scenes))[:, None, None]
    pixels = pixels + spread * torch.randn(pixels.shape, generator=rng)
    return (pixels.clamp(0, 1) * 255).round() / 255


def pictures(pixels: Tensor) -> list[Any]:
    """PIL pictures, in shades of grey, of [b, height, width] in 0 to 1."""
    from PIL import Image

    return [Image.fromarray(own) for own in (pixels * 255).round().to(torch.uint8).numpy()]


@dataclass(frozen=True)
class Asked:
    """Some pictures [b, 40, 40] with the scenes that they show and questions for each."""

    scenes: tuple[Scene, ...]
    pixels: Tensor
    questions: tuple[tuple[Question, ...], ...]


def training(size: int, seed: int, *, questions: int = 6, noisiest: float = 0.8) -> Iterator[Asked]:
    """Endless, and the same again for the same arguments: batch after batch of scenes, one in three noisy."""
    for step in itertools.count():
        yield training_batch(size, seed, step, questions=questions, noisiest=noisiest)


def training_batch(size: int, seed: int, step: int, *, questions: int = 6, noisiest: float = 0.8) -> Asked:
    """Batch number `step`, a function of its arguments alone. One scene in five is unpaired: the prior is a habit, no
    law."""
    own, rng = random.Random(f"scenes {seed} {step}"), generator("scenes", "train", seed, step)
    scenes = tuple(draw_scene(own, paired=own.random() < 0.8) for _ in range(size))
    noise = torch.tensor([max(0.0, own.uniform(-2 * noisiest, noisiest)) for _ in range(size)])
    kinds = [[*KINDS, *own.choices(KINDS[2:], k=questions)][:questions] for _ in scenes]
    asked = tuple(tuple(ask(scene, kind, own) for kind in each) for scene, each in zip(scenes, kinds, strict=True))
    return Asked(scenes, render(scenes, rng, noise=noise), asked)


def held_out(size: int, *, noise: float = 0.0, paired: bool = False, kind: str | None = None, seed: int = 0) -> Asked:
    """Scenes of held-out glyphs, one question each: kinds in turn, or all of one kind."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r}; want one of {', '.join(KINDS)}, or None for all in turn")
    own, rng = random.Random(f"scenes held {seed}"), generator("scenes", "held", seed)
    scenes = tuple(draw_scene(own, paired=paired) for _ in range(size))
    asked = tuple((ask(scene, kind or KINDS[i % len(KINDS)], own),) for i, scene in enumerate(scenes))
    return Asked(scenes, render(scenes, rng, noise=noise, held=True), asked)


def believed(scenes: Sequence[Scene], how: str, *, seed: int = 0) -> list[list[Question]]:
    """For each scene "is there" of digits that are there and of as many that are not (POPE, arXiv 2305.10355), the
    absent ones drawn at random, from the commonest ("popular"), or from partners of those there ("adversarial"). A
    scene that has no partner to ask for is asked nothing in the adversarial form.
    """
    own, found = random.Random(f"believed {how} {seed}"), []
    for scene in scenes:
        absent = [digit for digit in range(CLASSES) if digit not in scene.digits]
        common = [digit for pair in PAIRS for digit in pair if digit in absent]
        partners = [digit for digit in dict.fromkeys(PARTNER[own] for own in scene.digits) if digit in absent]
        choices = {"random": own.sample(absent, len(absent)), "popular": common, "adversarial": partners}
        if how not in choices:
            raise ValueError(f"how={how!r}; want one of {', '.join(choices)}")
        there = list(dict.fromkeys(scene.digits))
        wrong = choices[how][: len(there)]
        found.append([exists(scene, digit) for digit in (*own.sample(there, len(wrong)), *wrong)])
    return found
