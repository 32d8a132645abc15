"""Counting letters of words: how often one occurs, a pair occurs, how many there are, how many different ones."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.tasks.draw import generator
from manyheads.tasks.maze import whole_answers
from manyheads.tasks.task import IGNORED, Batch, Generated, register_task, regrouped, whole
from manyheads.tasks.text import standard_library, texts

SHORTEST, LONGEST = 3, 14
KINDS = ("character", "substring", "length", "distinct")
PAD, KIND_0, NONE, COLON, EQUALS = 0, 1, 5, 6, 7
LETTER_0 = 8
NUMBER_0 = LETTER_0 + 26
PIECE_0 = NUMBER_0 + LONGEST + 1
_TEXT = 4_000_000


@register_task
@dataclass(frozen=True, kw_only=True)
class Counting(Generated):
    """A question about a word's letters, the word, then the number; or first the word spelt with a running count.

    kind: "character" (how often is this letter in the word), "substring" (this pair, overlaps counted), "length",
    "distinct" (how many different letters), or "mixed", each row its own. What is asked for is in the word with chance
    1/2, and else drawn from the alphabet. pieces: letters a token of the word (2 hides from the model what it counts,
    as subwords do). trace: the answer is every letter with the count up to it, as reasoning before answering is.
    Asked is what follows "=", with the truth before it as input, and scored by whole answers. Words are identifiers of
    the standard library's sources, of 3 to 14 letters; those of the evaluation do not occur in training.
    The best constant answer is right in 0.46 of characters, 0.5 of pairs, 0.13 of lengths, 0.19 of different letters.
    Source: the four tasks of arXiv:2410.14166 by its abstract and description; its repository was not found, so words,
    shares and the form of the trace are of our own. Its multiple-choice form and its prompts of models are not here.
    """

    name: ClassVar[str] = "counting"
    title: ClassVar[str] = "Counting letters of words"
    pattern: ClassVar[str] = "causal-self"
    metric: ClassVar[str] = "whole answers right"

    kind: str = "mixed"
    pieces: int = 1
    trace: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in (*KINDS, "mixed"):
            raise ValueError(f"counting: kind={self.kind!r}; want one of {[*KINDS, 'mixed']}")
        whole(self, "pieces", self.pieces, 1, 3)
        if not isinstance(self.trace, bool):
            raise ValueError(f"counting: trace={self.trace!r}; want true or false")

    @property
    def n(self) -> int:
        return 5 + -(-LONGEST // self.pieces) + (2 * LONGEST if self.trace else 0)

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": PIECE_0 + 27**self.pieces, "max_length": self.n}

    def sample(self, count: int, rng: Generator) -> Batch:
        return self._draw(count, words()[0], rng)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        rng, block = generator(self.name, "eval"), 64
        sizes = (min(block, self.eval_examples - start) for start in range(0, self.eval_examples, block))
        return regrouped((self._draw(size, words()[1], rng) for size in sizes), batch_size)

    def _draw(self, count: int, known: list[str], rng: Generator) -> Batch:
        drawn = random.Random(int(torch.randint(1 << 62, (1,), generator=rng)))
        tokens = torch.full((count, self.n + 1), PAD)
        targets = torch.full((count, self.n), IGNORED)
        for row in range(count):
            question, answer = self._one(drawn.choice(known), drawn)
            at, end = len(question), len(question) + len(answer)
            written = torch.tensor(question + answer)
            tokens[row, :end] = written
            targets[row, at - 1 : end - 1] = written[at:]
        return Batch({"input_ids": tokens[:, :-1].contiguous()}, targets)

    def _one(self, word: str, rng: random.Random) -> tuple[list[int], list[int]]:
        kind = rng.randrange(len(KINDS)) if self.kind == "mixed" else KINDS.index(self.kind)
        asked = "" if kind > 1 else _sought(word, kind + 1, rng)
        letters = [ord(letter) - 97 for letter in word]
        question = [KIND_0 + kind, *(LETTER_0 + ord(letter) - 97 for letter in asked)]
        question += [NONE] * (3 - len(question)) + [COLON]
        question += [_piece(letters[i : i + self.pieces], self.pieces) for i in range(0, len(word), self.pieces)]
        counts = running(KINDS[kind], word, asked)
        spelt = [token for pair in zip(letters, counts, strict=True) for token in _spelt(*pair)]
        return [*question, EQUALS], (spelt if self.trace else [NUMBER_0 + counts[-1]])

    def score(self, logits: Tensor, targets: Tensor) -> tuple[float, int]:
        self.asked(logits, targets)
        return whole_answers(logits, targets)


def _spelt(letter: int, count: int) -> tuple[int, int]:
    return LETTER_0 + letter, NUMBER_0 + count


def _sought(word: str, length: int, rng: random.Random) -> str:
    if rng.random() < 0.5:
        start = rng.randrange(len(word) - length + 1)
        return word[start : start + length]
    return "".join(chr(97 + rng.randrange(26)) for _ in range(length))


def _piece(letters: list[int], pieces: int) -> int:
    """One token for up to `pieces` letters; 26 stands behind a word's last ones."""
    number = 0
    for place in range(pieces):
        number = 27 * number + (letters[place] if place < len(letters) else 26)
    return PIECE_0 + number


def running(kind: str, word: str, asked: str) -> list[int]:
    """The count after each letter of the word."""
    if kind == "length":
        return list(range(1, len(word) + 1))
    counts, seen = [], 0
    for end in range(1, len(word) + 1):
        seen += word[end - 1] not in word[: end - 1] if kind == "distinct" else word[:end].endswith(asked)
        counts.append(seen)
    return counts


@lru_cache(maxsize=1)
def words() -> tuple[list[str], list[str]]:
    """Those to train on, and those to evaluate on, which are none of the former."""
    train, held = (
        {name.decode() for name in re.findall(rb"[a-z]{%d,}" % SHORTEST, bytes(part.numpy()).lower())}
        for part in texts(standard_library(), _TEXT)
    )
    return _fitting(train), _fitting(held - train)


def _fitting(found: set[str]) -> list[str]:
    return sorted(word for word in found if len(word) <= LONGEST)
