"""Scenes of digits: what is drawn, what is asked and what is answered say the same."""

import random
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from manyheads.tasks.digits import split
from manyheads.tasks.draw import generator
from manyheads.tasks.scenes import (
    CELL,
    GRID,
    KINDS,
    PARTNER,
    Scene,
    ask,
    believed,
    draw_scene,
    exists,
    held_out,
    left,
    pictures,
    render,
    training,
    training_batch,
)

SCENE = Scene(((0, 0, 8), (0, 3, 7), (2, 1, 3), (2, 2, 8)))


def test_answers_by_the_scene() -> None:
    assert (SCENE.count(), SCENE.count(8), SCENE.count(5)) == (4, 2, 0)
    assert SCENE.left_of(7) == 8
    assert left(SCENE, 3).answer == "nothing"
    assert exists(SCENE, 8).text == "Is there an 8?"
    with pytest.raises(ValueError, match="an 8 is 2 times in the scene; left_of wants it once"):
        SCENE.left_of(8)


def test_left_is_the_nearest_in_the_row() -> None:
    assert Scene(((1, 0, 4), (1, 1, 5), (1, 3, 6), (2, 2, 9))).left_of(6) == 5


def test_answers_against_a_loop_over_the_cells() -> None:
    """Of 300 scenes, each answer anew from a grid of cells."""
    rng = random.Random(0)
    for number in range(300):
        scene = draw_scene(rng, paired=number % 2 == 0)
        grid = [[None] * GRID for _ in range(GRID)]
        for row, column, digit in scene.places:
            grid[row][column] = digit
        flat = [own for line in grid for own in line if own is not None]
        own = ask(scene, KINDS[number % len(KINDS)], rng)
        if own.kind == "caption":
            wanted = ", ".join(str(digit) for digit in flat)
        elif own.kind == "exists":
            wanted = "yes" if own.about in flat else "no"
        elif own.kind == "left":
            line = next(line for line in grid if own.about in line)
            before = [digit for digit in line[: line.index(own.about)] if digit is not None]
            wanted = str(before[-1]) if before else "nothing"
        else:
            wanted = str(len(flat) if own.about is None else flat.count(own.about))
        assert own.answer == wanted, (scene, own)


def test_a_picture_shows_its_scene() -> None:
    """Each cell holds a whole glyph of its digit, of the side that was asked for, and the others hold nothing."""
    scenes = [draw_scene(random.Random(seed), paired=False) for seed in range(20)]
    pixels = render(scenes, generator("test"), held=True)
    images, labels = split()[1]
    for scene, canvas in zip(scenes, pixels, strict=True):
        for row in range(GRID):
            for column in range(GRID):
                cell = canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
                digit = {(i, j): own for i, j, own in scene.places}.get((row, column))
                windows = cell.unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 64) * 16
                glyphs = images[labels == digit].flatten(1).float()
                near = digit is not None and float(torch.cdist(windows, glyphs).min()) < 0.5
                assert near if digit is not None else not cell.any()


def test_a_file_keeps_the_picture() -> None:
    """What PIL holds in bytes is what the tensor held."""
    import numpy as np

    pixels = held_out(3, noise=0.5).pixels
    again = torch.stack([torch.from_numpy(np.array(own)).float() / 255 for own in pictures(pixels)])
    assert_close(again, pixels, atol=1e-6, rtol=0)


def test_the_same_again_and_others_elsewhere() -> None:
    one, again, other = (training_batch(4, seed, 7) for seed in (0, 0, 1))
    assert one.scenes == again.scenes
    assert one.questions == again.questions
    assert torch.equal(one.pixels, again.pixels)
    assert one.scenes != other.scenes
    stream = training(4, 0)
    assert [next(stream).scenes for _ in range(2)] == [training_batch(4, 0, step).scenes for step in range(2)]
    assert held_out(4).scenes == held_out(4).scenes
    assert held_out(5, kind="left").questions[0][0].kind in ("left", "count")
    with pytest.raises(ValueError, match="kind='where'; want one of caption"):
        held_out(4, kind="where")


def test_the_prior_holds_in_paired_scenes_alone() -> None:
    """A digit in a paired scene of two or more nearly always has its partner beside it."""
    rng = random.Random(1)

    def together(paired: bool) -> float:
        scenes = [own for own in (draw_scene(rng, paired=paired) for _ in range(600)) if len(own.places) > 1]
        return sum(any(PARTNER[digit] in own.digits for digit in own.digits) for own in scenes) / len(scenes)

    assert together(True) > 0.85
    assert together(False) < 0.6
    common = Counter(digit for _ in range(600) for digit in draw_scene(rng).digits)
    assert common[3] > 2 * common[0]


@pytest.mark.parametrize("how", ["random", "popular", "adversarial"])
def test_beliefs_ask_as_often_for_what_is_not_there(how: str) -> None:
    scenes = [draw_scene(random.Random(seed), paired=False) for seed in range(50)]
    for scene, asked in zip(scenes, believed(scenes, how), strict=True):
        absent = [own for own in asked if own.answer == "no"]
        assert len(absent) * 2 == len(asked)
        assert all((own.about in scene.digits) == (own.answer == "yes") for own in asked)
        if how == "adversarial":
            assert all(PARTNER[own.about or 0] in scene.digits for own in absent)
    with pytest.raises(ValueError, match="how='rare'; want one of random"):
        believed(scenes, "rare")
