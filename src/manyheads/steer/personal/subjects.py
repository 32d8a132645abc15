"""What a personalisation is given: pictures with captions and masks, and the words that it learns.

Shapes: b pictures, c channels, m words of the captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.image_files import opened_image
from manyheads.near import suggest
from manyheads.runs.given import read_text, shown

MOST_PICTURES, MOST_CAPTION = 200, 10_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclass(frozen=True)
class Subject:
    """A word that is learnt. origin: the word that it begins as, None where it is of the model's own vocabulary."""

    word: str
    origin: str | None = None


@dataclass(frozen=True)
class Album:
    """pictures [b, c, height, width] from -1 to 1, their captions and file names; masks: (picture, word) -> [height,
    width], True where the word's subject stands, as far as they were given."""

    pictures: Tensor
    captions: tuple[str, ...]
    subjects: tuple[Subject, ...]
    names: tuple[str, ...] = ()
    masks: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        return [own.word for own in self.subjects]

    def before(self, caption: str) -> str:
        """The caption in words that the model knew before."""
        known = {own.word: own.origin for own in self.subjects if own.origin is not None}
        return " ".join(known.get(word, word) for word in caption.split())


def read_subjects(model: Any, typed: Sequence[str]) -> tuple[Subject, ...]:
    """'mine=a': a new word that begins as one which the model knows; '3': a word that it knows. ValueError for a
    subject of several words, a new word without one to begin as, a known one with, and one that is there twice."""
    known, found = list(model.config.words), []
    for text in typed:
        word, equals, origin = (part.strip().lower() for part in text.partition("="))
        for part in (word, *([origin] if equals else [])):
            if len(part.split()) != 1:
                raise ValueError(
                    f"--subject {shown(text)}: {shown(part)} is {len(part.split())} words: want one, NEW=KNOWN "
                    "(a subject of several words has a subject for each)"
                )
        if equals and word in known:
            raise ValueError(f"--subject {shown(text)}: the model knows {word!r} already: leave ={origin} out")
        wanted = origin if equals else word
        if wanted not in known[1:]:
            how = "" if equals else f" (a new word says what it begins as: {word}=WORD)"
            raise ValueError(
                f"--subject {shown(text)}: the model does not know {shown(wanted)}{suggest(wanted, known)}{how}; its "
                f"words are {' '.join(known[1:])}"
            )
        found.append(Subject(word, origin if equals else None))
    words = [own.word for own in found]
    if not words or len(set(words)) < len(words):
        raise ValueError(f"--subject is given {len(words)} times ({', '.join(words) or 'none'}): want different words")
    return tuple(found)


@torch.no_grad()
def learn_words(model: Any, subjects: Sequence[Subject]) -> None:
    """New words at the end of the vocabulary, each as the word that it begins as."""
    table, words = model.words, list(model.config.words)
    added = [own for own in subjects if own.origin is not None]
    rows = torch.stack([table.weight[words.index(str(own.origin))] for own in added]) if added else table.weight[:0]
    grown = nn.Embedding(len(words) + len(added), table.embedding_dim).to(table.weight)
    grown.weight.copy_(torch.cat([table.weight, rows]))
    model.words = grown
    model.config.words = [*words, *(own.word for own in added)]


def word_numbers(model: Any, subjects: Sequence[Subject]) -> list[int]:
    return [model.config.words.index(own.word) for own in subjects]


def read_album(
    model: Any, files: Sequence[Path], subjects: Sequence[Subject], caption: str | None, draws: Any
) -> Album:
    """The pictures of these files, the model's words already learnt. A caption is in NAME.txt beside NAME.png, or else
    `caption`; a mask of a subject's word in NAME.WORD.png, white where it stands. draws(picture) reads a picture as the
    model draws; ValueError, with the file, for what does not fit."""
    if not files or len(files) > MOST_PICTURES:
        raise ValueError(f"{len(files)} pictures to learn from: want 1 to {MOST_PICTURES} (--images FOLDER, --image)")
    words, size = [own.word for own in subjects], model.config.image_size
    pictures, captions, masks = [], [], {}
    for number, file in enumerate(files):
        pictures.append(_drawn(draws, file))
        captions.append(_caption(model, file, caption, words))
        for word in words:
            beside = file.with_name(f"{file.stem}.{word}.png")
            if beside.is_file():
                masks[number, word] = _mask(beside, size, word, captions[-1])
    lost = [word for word in words if not any(word in own.split() for own in captions)]
    if lost:
        raise ValueError(f"no caption has the subject {lost[0]!r}: say it in --text, or in a NAME.txt beside NAME.png")
    names = tuple(file.name for file in files)
    return Album(torch.cat(pictures), tuple(captions), tuple(subjects), names, masks)


def listed(folder: Path, words: Sequence[str]) -> list[Path]:
    """The pictures of a folder in order of their names, masks (NAME.WORD.png) left out."""
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is no folder")
    found = [own for own in sorted(folder.iterdir()) if own.suffix.lower() in SUFFIXES and own.is_file()]
    there = [own for own in found if not any(own.stem.endswith(f".{word}") for word in words)]
    if not there:
        raise ValueError(f"--images {folder} holds no picture ({', '.join(SUFFIXES)})")
    return there


def _drawn(draws: Any, file: Path) -> Tensor:
    try:
        own: Tensor = draws(opened_image(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return own


def _caption(model: Any, file: Path, caption: str | None, words: Sequence[str]) -> str:
    beside = file.with_suffix(".txt")
    said = read_text(beside, most=MOST_CAPTION, what=str(beside)) if beside.is_file() else caption
    if said is None or not said.strip():
        raise ValueError(f"{file} has no caption: write it to {beside.name} beside it, or give --text for all")
    told = " ".join(said.lower().split())
    try:
        model.encode([told])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not any(word in told.split() for word in words):
        raise ValueError(f"{file}: the caption {shown(told)} has no subject; want one of {', '.join(words)} in it")
    for word in words:
        if told.split().count(word) > 1:
            raise ValueError(f"{file}: the caption {shown(told)} has {word!r} twice: whose map is meant is not known")
    return told


def _mask(file: Path, size: int, word: str, caption: str) -> Tensor:
    picture = opened_image(file)
    if picture.size != (size, size):
        wide, high = picture.size
        raise ValueError(f"{file} is {wide} x {high} pixels; a mask has the picture's {size} x {size}")
    if word not in caption.split():
        raise ValueError(f"{file} is a mask of {word!r}, which the caption {shown(caption)} does not have")
    levels = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8).view(size, size)
    inside = levels >= 128
    if not bool(inside.any()) or bool(inside.all()):
        raise ValueError(
            f"{file} is {'white' if bool(inside.any()) else 'black'} all over: a mask is white where it is"
        )
    return inside
