"""What a model draws from a command line or a form, and how the arguments of interventions name its parts: words of the
caption, regions of the picture, steps, captions drawn beside it, a reference picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.models.flow import GUIDANCE, STEPS
from manyheads.runs.given import parse_json, shown
from manyheads.steer.diffusion.common import Active, Box, box_mask, until

MOST_STEPS, MOST_BESIDE = 200, 8


@dataclass(frozen=True)
class Drawing:
    """caption, steps, seed and guidance of `sample`; picture: a reference [1, c, height, width] from -1 to 1."""

    caption: str
    steps: int = STEPS
    seed: int = 0
    guidance: float = GUIDANCE
    picture: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """captions: what is drawn together, the one that was asked for first. held: what the last of them are at every
    step, [steps + 1, k, c, height, width], of pictures that are there already."""

    captions: tuple[str, ...]
    held: Tensor | None = None


def pixels_of(model: Any, picture: Any) -> Tensor:
    """A PIL picture as the model draws, [1, c, height, width] from -1 to 1; ValueError for another size, as nothing is
    resized unasked."""
    config = model.config
    if picture.size != (config.image_size, config.image_size):
        wide, high = picture.size
        raise ValueError(
            f"--image is {wide} x {high} pixels; the model draws {config.image_size} x {config.image_size}: resize it"
        )
    shown_as = picture.convert("L" if config.num_channels == 1 else "RGB")
    levels = torch.frombuffer(bytearray(shown_as.tobytes()), dtype=torch.uint8).float() / 127.5 - 1
    own = levels.view(1, config.image_size, config.image_size, -1).permute(0, 3, 1, 2)
    return own.to(model.device, model.dtype)


@contextmanager
def drawn_with(change: AbstractContextManager[Any], rows: Rows) -> Iterator[Rows]:
    """The intervention, open, and what is drawn in it."""
    with change:
        yield rows


def beside(model: Any, drawing: Drawing, who: str, captions: Sequence[str]) -> Rows:
    """The drawing with others drawn beside it. ValueError for words that the model does not know, and too many."""
    given = [caption.strip() for caption in captions if caption.strip()]
    if not given or len(given) > MOST_BESIDE:
        raise ValueError(f"{who}: {len(given)} captions beside the drawing: give 1 to {MOST_BESIDE}, parted by ;")
    model.encode(given)
    return Rows((drawing.caption, *given))


def referred(model: Any, drawing: Drawing, who: str, source: str) -> Rows:
    """The drawing with its reference as the last row: the picture that was given, which goes the way that it came from
    noise and whose caption `source` is, or else a drawing of that caption."""
    rows = beside(model, drawing, who, [source])
    if drawing.picture is None:
        return rows
    return Rows(rows.captions, model.invert(drawing.picture, [source], steps=drawing.steps))


def first_steps(who: str, drawing: Drawing, share: float) -> Active:
    """The first share of the drawing's steps."""
    try:
        return until(share, drawing.steps)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def some_steps(who: str, drawing: Drawing, steps: str | None) -> Active | None:
    """'0-4,9': those steps; None: all. ValueError for one that the drawing does not have."""
    if not (steps or "").strip():
        return None
    assert steps is not None
    chosen: set[int] = set()
    for part in steps.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", part)
        if found is None:
            raise ValueError(f"{who}: steps={shown(steps)}: want such as 0-4 or 0,3,9")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < drawing.steps:
            raise ValueError(
                f"{who}: steps={shown(steps)}: {part.strip()} is outside of the schedule, which has steps 0 to "
                f"{drawing.steps - 1}"
            )
        chosen |= set(range(first, last + 1))
    return lambda step, layer: step in chosen


def word_places(model: Any, drawing: Drawing, who: str, words: str) -> list[int]:
    """'left,7': all places of these words in the caption as the model reads it."""
    ids, _ = model.encode([drawing.caption])
    said = [model.config.words[i] for i in ids[0].tolist()]
    wanted = [word.strip().lower() for word in words.split(",") if word.strip()]
    strange = [word for word in wanted if word not in said[1:]]
    if strange or not wanted:
        raise ValueError(
            f"{who}: words={shown(words)}: the caption has no {shown(strange[0]) if strange else 'empty word'}; its "
            f"words are {', '.join(dict.fromkeys(said[1:])) or 'none'}"
        )
    return [place for place, word in enumerate(said) if place and word in wanted]


# -- regions -----------------------------------------------------------------------------------------------------------


def read_box(model: Any, who: str, value: Any) -> Tensor:
    """[top, left, bottom, right] in pixels -> its mask [height, width]."""
    good = isinstance(value, list) and len(value) == 4 and all(type(own) is int for own in value)
    if not good:
        raise ValueError(f"{who}: {shown(str(value))} is no region: want [top, left, bottom, right] in whole pixels")
    box: Box = (value[0], value[1], value[2], value[3])
    try:
        return box_mask(model, box)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def read_boxes(model: Any, who: str, text: str, least: int = 1) -> Tensor:
    """'[[4,0,12,8],[4,8,12,16]]' -> masks [k, height, width]."""
    boxes = _json(who, text)
    if not isinstance(boxes, list) or not least <= len(boxes) <= MOST_BESIDE:
        raise ValueError(
            f"{who}: {shown(text)}: want {least} to {MOST_BESIDE} boxes such as [[4,0,12,8],[4,8,12,16]], each "
            "[top, left, bottom, right] in pixels"
        )
    return torch.stack([read_box(model, who, box) for box in boxes])


def read_regions(model: Any, who: str, text: str) -> tuple[list[str], Tensor]:
    """'{"a 3": [4,0,12,8]}' -> captions, and their masks [k, height, width]."""
    captions, boxes = _captioned(who, text, "[top, left, bottom, right]")
    return captions, torch.stack([read_box(model, who, box) for box in boxes])


def read_centres(who: str, text: str) -> tuple[list[str], list[tuple[float, float]]]:
    """'{"a 3": [0.5,0.25]}' -> captions, and the row and column of their places, in parts of the picture."""
    captions, places = _captioned(who, text, "[row, column] from 0 to 1")
    for place in places:
        good = isinstance(place, list) and len(place) == 2
        if not good or not all(type(own) in (int, float) and 0 <= own <= 1 for own in place):
            raise ValueError(f"{who}: {shown(str(place))} is no place in the picture: want [row, column] from 0 to 1")
    return captions, [(float(place[0]), float(place[1])) for place in places]


def _captioned(who: str, text: str, what: str) -> tuple[list[str], list[Any]]:
    found = _json(who, text)
    if not isinstance(found, dict) or not 0 < len(found) <= MOST_BESIDE:
        raise ValueError(
            f'{who}: {shown(text)}: want 1 to {MOST_BESIDE} captions with {what}, such as {{"a 3": [...]}}'
        )
    return [str(caption) for caption in found], list(found.values())


def _json(who: str, text: str) -> Any:
    try:
        return parse_json(text, who)
    except ValueError:
        raise ValueError(f"{who}: {shown(text)} is no JSON: quote captions, [ ] around numbers") from None
