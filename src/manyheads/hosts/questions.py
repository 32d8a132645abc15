"""What a shrunk cache is asked: keys hidden in text, several named keys, and the text itself; for bytes or a tokenizer.

Every trial is a function of the seed and its own number, so that a measurement that was stopped goes on with the same.
Lengths count all tokens, the question and its answer included.
"""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from manyheads.hosts.loading import Loaded
from manyheads.hosts.probes import DIGITS, NAMED_QUESTION, NAMED_STATEMENT, NAMES, QUESTION, STATEMENT

# Characters that text is cut to before a tokenizer reads it.
_TEXT = 600_000
# Of the standard library's files the recipe of the packaged model holds every twentieth back; these folders it skips.
_HELD_OUT = 20
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Trial:
    """prefix: what the cache is filled with in one pass. tail: what follows, token by token. answers: spans in tail."""

    prefix: list[int]
    tail: list[int]
    answers: tuple[tuple[int, int], ...]
    depth: float | None = None

    def within(self) -> list[Trial]:
        """The same with each question in the prefix: a policy has seen it when it chooses what to drop."""
        return [
            Trial(self.prefix + self.tail[:start], self.tail[start:stop], ((0, stop - start),), self.depth)
            for start, stop in self.answers
        ]


class Questions:
    """text: what filler and windows are taken from; held-out sources of the standard library unless given. turn: ids
    that stand before and behind all text, as a chat template has them around what a user says: questions follow."""

    def __init__(
        self, loaded: Loaded, *, text: str | None = None, where: str = "the text", seed: int = 0,
        turn: tuple[list[int], list[int]] | None = None,
    ) -> None:  # fmt: skip
        if text is not None and not text.strip():
            raise ValueError(f"{where} is empty: give a file with some text")
        self.loaded, self.where, self.seed, self.turn = loaded, where, seed, turn
        self.text = held_out() if text is None else text[:_TEXT]

    def passkey(self, length: int, depth: float, number: int) -> Trial:
        """One pass key, told at a depth of the filler from 0 to 1."""
        rng = self._rng("passkey", length, depth, number)
        return self._needle(rng, length, depth, STATEMENT[0], STATEMENT[1], QUESTION)

    def needle(self, length: int, depth: float, number: int) -> Trial:
        """One named number, the name drawn anew for every trial."""
        rng = self._rng("needle", length, depth, number)
        name = rng.choice(NAMES)
        head, tail = NAMED_STATEMENT
        return self._needle(rng, length, depth, head.format(name), tail, NAMED_QUESTION.format(name, name))

    def recall(self, length: int, number: int) -> Trial:
        """Several named numbers, all asked for one after the other in another order."""
        rng = self._rng("recall", length, number)
        head, tail = NAMED_STATEMENT
        parts = [
            self._part(rng, head.format(name), tail, NAMED_QUESTION.format(name, name))
            for name in rng.sample(self._alike, keys_in(length))
        ]
        spare = self._spare(length, parts)
        cuts = sorted(rng.randint(0, spare) for _ in parts)
        return self._trial(rng, parts, cuts, spare, rng.sample(range(len(parts)), len(parts)), None)

    def windows(self, length: int, count: int) -> list[list[int]]:
        """Stretches of the text, spread over it evenly, with the tokenizer's first token in front."""
        ids, lead = self._ids, self._lead
        body = length - len(lead)
        if len(ids) < body:
            raise ValueError(
                f"{self.where} has {len(ids)} tokens; windows of --length {length} need {body}: "
                "give a longer text or a smaller --length"
            )
        fit = max(1, min(count, len(ids) // body))
        starts = [i * (len(ids) - body) // max(1, fit - 1) for i in range(fit)]
        return [lead + ids[start : start + body] for start in starts]

    # -- parts -----------------------------------------------------------------------------------------------------

    def _rng(self, *facts: object) -> random.Random:
        return random.Random(" ".join(map(str, (self.seed, *facts))))

    def _needle(self, rng: random.Random, length: int, depth: float, head: str, tail: str, question: str) -> Trial:
        parts = [self._part(rng, head, tail, question)]
        spare = self._spare(length, parts)
        return self._trial(rng, parts, [round(depth * spare)], spare, [0], depth)

    def _part(self, rng: random.Random, head: str, tail: str, question: str) -> tuple[list[int], list[int], list[int]]:
        """Ids of a statement, of its question up to the answer, and of the answer."""
        digits = "".join(str(rng.randint(0, 9)) for _ in range(DIGITS))
        asking, answer = split(self.loaded, question, digits)
        return self.loaded.encode(head + digits + tail), asking, answer

    def _spare(self, length: int, parts: Sequence[tuple[list[int], list[int], list[int]]]) -> int:
        """Tokens of filler."""
        taken = len(self._lead) + len(self._behind) + sum(map(len, (ids for part in parts for ids in part)))
        taken += (len(parts) - 1) * len(self._stop)
        if length - taken < len(parts):
            raise ValueError(f"--length {length} is too short for {len(parts)} keys: it takes at least {taken + 1}")
        return length - taken

    def _trial(
        self,
        rng: random.Random,
        parts: Sequence[tuple[list[int], list[int], list[int]]],
        cuts: Sequence[int],
        spare: int,
        order: Sequence[int],
        depth: float | None,
    ) -> Trial:
        filler, prefix, before = self.stretch(rng, spare), list(self._lead), 0
        for cut, (statement, _, _) in zip(cuts, parts, strict=True):
            prefix += filler[before:cut] + statement
            before = cut
        prefix += filler[before:] + self._behind
        tail: list[int] = []
        answers = []
        for i in order:
            _, asking, answer = parts[i]
            tail += (self._stop if tail else []) + asking
            answers.append((len(tail), len(tail) + len(answer)))
            tail += answer
        return Trial(prefix, tail, tuple(answers), depth)

    def stretch(self, rng: random.Random, size: int) -> list[int]:
        """So many tokens of the text, from anywhere in it."""
        ids = self._ids
        while len(ids) <= size:
            ids = ids + ids
        start = rng.randint(0, len(ids) - size - 1)
        return ids[start : start + size]

    @cached_property
    def _ids(self) -> list[int]:
        return self.loaded.encode(self.text)

    @cached_property
    def _stop(self) -> list[int]:
        return self.loaded.encode(".")

    @cached_property
    def _lead(self) -> list[int]:
        """The token that the tokenizer puts in front of every text, if it does; a turn's beginning."""
        if self.turn is not None:
            return self.turn[0]
        tokenizer = self.loaded.tokenizer
        if tokenizer is None or tokenizer.bos_token_id is None:
            return []
        return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []

    @property
    def _behind(self) -> list[int]:
        return [] if self.turn is None else self.turn[1]

    @cached_property
    def _alike(self) -> list[str]:
        """Names of which statement and question take equally many tokens, so that trials fit into one batch."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in NAMES:
            texts = (NAMED_STATEMENT[0].format(name), NAMED_QUESTION.format(name, name))
            groups.setdefault(tuple(len(self.loaded.encode(text)) for text in texts), []).append(name)
        return max(groups.values(), key=len)


def split(loaded: Loaded, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of the question and of the answer, cut where the tokenizer cuts the two together: it may join the space
    between them to the answer."""
    if loaded.tokenizer is None:
        return loaded.encode(question), loaded.encode(answer)
    whole, start = loaded.encode(question + answer), loaded.encode(question)
    same = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), min(len(whole), len(start)))
    return whole[:same], whole[same:]


def keys_in(length: int) -> int:
    """How many keys a recall trial has."""
    return max(2, min(4, length // 128))


@lru_cache(maxsize=1)
def held_out() -> str:
    """Sources of the standard library that the packaged model was not trained on."""
    return _sources(lambda number: number % _HELD_OUT == 0, _TEXT)


@lru_cache(maxsize=1)
def library_text() -> str:
    """Sources of the standard library beside the held-out ones: to calibrate and to train on."""
    return _sources(lambda number: number % _HELD_OUT != 0 and number % 3 == 0, _TEXT)


def _sources(wanted: Callable[[int], bool], most: int) -> str:
    """Files of the standard library by their number in the order of their names, cut to so many characters."""
    root, paths = _library_files()
    texts, size = [], 0
    for number, path in enumerate(paths):
        if size > most:
            break
        if not wanted(number) or _SKIPPED & set(path):
            continue
        data = root.joinpath(*path).read_bytes()
        if data.isascii():
            texts.append(data.decode())
            size += len(data)
    return "\n".join(texts)[:most]


@lru_cache(maxsize=1)
def _library_files() -> tuple[Path, list[list[str]]]:
    """The standard library's folder, and the parts of what it holds in the order of the names: thousands of files,
    walked once, and as texts, since to sort as many paths takes half a second."""
    root = sysconfig.get_paths()["stdlib"]
    start = len(root.rstrip(os.sep)) + 1
    found = [f"{folder}{os.sep}{name}"[start:] for folder, _, names in os.walk(root) for name in names]
    return Path(root), sorted(path.split(os.sep) for path in found if path.endswith(".py"))
