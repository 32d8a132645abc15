"""What heads are measured on: keys hidden in text, random tokens repeated, and plain text; for bytes or a tokenizer.

Every input is a function of the seed and its number, so that a measurement that was stopped goes on with the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from manyheads.hosts.loading import Loaded

STATEMENT = ("\nThe pass key is ", ". Remember it.\n")
QUESTION = "\nWhat is the pass key? The pass key is "
NAMED_STATEMENT = ("\nThe {} number is ", ".\n")
NAMED_QUESTION = "\nWhat is the {} number? The {} number is "
# fmt: off
NAMES = (
    "amber", "birch", "cedar", "coral", "delta", "ember", "fjord", "grove", "hazel", "indigo", "jade", "karst",
    "lilac", "maple", "north", "olive", "pearl", "quartz", "river", "slate", "topaz", "umber", "violet", "willow",
)
# fmt: on
DIGITS = 5
# Text that a haystack is cut from.
_HAYSTACK_BYTES = 400_000


@dataclass(frozen=True)
class Needles:
    """ids [n]; told and asked: the span of every key where it is told, and where it is the answer."""

    ids: Tensor
    told: list[tuple[int, int]]
    asked: list[tuple[int, int]]

    @property
    def labels(self) -> Tensor:
        """[n] True where the next token is part of an answer."""
        marked = torch.zeros(len(self.ids), dtype=torch.bool)
        for start, end in self.asked:
            marked[start - 1 : end - 1] = True
        return marked


class Inputs:
    """text: what plain text is taken from; the sources of Python's standard library unless given."""

    def __init__(self, loaded: Loaded, *, seed: int = 0, text: str | None = None, where: str = "the text"):
        self.loaded, self.seed, self.where = loaded, seed, where
        self._text = text
        if text is not None and not text.strip():
            raise ValueError(f"{where} is empty: give a file with some text")

    # -- keys in a haystack ----------------------------------------------------------------------------------------

    def needles(self, length: int, number: int, *, keys: int = 1, depth: float | None = None) -> Needles:
        """So many keys told among library text and asked for at the end, in another order; `length` tokens.

        depth: where the first key is told, 0 to 1; by chance without it. The text between the keys is one stretch."""
        rng = random.Random(f"needles {self.seed} {length} {number} {keys}")
        parts = self._parts(rng, keys)
        told_length = sum(len(h) + len(k) + len(t) for h, k, t, _ in parts)
        asked_length = sum(len(q) + len(k) + (1 if keys > 1 else 0) * len(self._between) for _, k, _, q in parts)
        spare = length - told_length - asked_length - len(self._prefix)
        if spare < 0:
            raise ValueError(
                f"{keys} hidden keys with their questions take {length - spare} tokens, and {length} are asked for: "
                "give a greater --length (half of it is measured too)"
            )
        cuts = sorted(rng.randint(0, spare) for _ in parts)
        if depth is not None:
            cuts[0] = min(round(depth * spare), *cuts[1:], spare)
        ids, told = list(self._prefix), []
        filler = self._stretch(rng, spare)
        before = 0
        for cut, (head, key, tail, _) in zip(cuts, parts, strict=True):
            ids += filler[before:cut] + head
            told.append((len(ids), len(ids) + len(key)))
            ids += key + tail
            before = cut
        ids += filler[before:]
        order = rng.sample(range(keys), keys)
        asked = []
        for i in order:
            ids += parts[i][3]
            asked.append((len(ids), len(ids) + len(parts[i][1])))
            ids += parts[i][1] + (self._between if keys > 1 else [])
        return Needles(torch.tensor(ids), [told[i] for i in order], asked)

    def room(self, length: int) -> int:
        """Keys that fill about a third of so many tokens, at least one, at most ten as DuoAttention has."""
        parts = self._parts(random.Random(0), 2)
        each = sum(len(h) + 2 * len(k) + len(t) + len(q) for h, k, t, q in parts) / 2
        return max(1, min(10, int(length / 3 / each)))

    def _parts(self, rng: random.Random, keys: int) -> list[tuple[list[int], list[int], list[int], list[int]]]:
        """Ids of what stands before a key, the key, what follows, and the question."""
        names = rng.sample(NAMES, keys)
        parts = []
        for name in names:
            head, tail = STATEMENT if keys == 1 else (NAMED_STATEMENT[0].format(name), NAMED_STATEMENT[1])
            question = QUESTION if keys == 1 else NAMED_QUESTION.format(name, name)
            digits = "".join(str(rng.randint(0, 9)) for _ in range(DIGITS))
            before, key = self._split(head, digits)
            # A tokenizer may cut a number otherwise after other words: the answer is what the statement says.
            parts.append((before, key, self.loaded.encode(tail), self._split(question, digits)[0]))
        return parts

    def _split(self, head: str, digits: str) -> tuple[list[int], list[int]]:
        """Ids before the digits and of the digits, as the tokenizer joins the space between them."""
        if self.loaded.tokenizer is None:
            return self.loaded.encode(head), self.loaded.encode(digits)
        whole, start = self.loaded.encode(head + digits), self.loaded.encode(head.rstrip())
        same = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), len(start))
        return whole[:same], whole[same:]

    # -- repeats ---------------------------------------------------------------------------------------------------

    def repeats(self, length: int, number: int, times: int = 4) -> tuple[Tensor, int, int]:
        """Random tokens told `times` times: ids, the period, and where the first period starts."""
        rng = random.Random(f"repeats {self.seed} {length} {number}")
        start = len(self._prefix)
        period = (length - start) // times
        if period < 2:
            raise ValueError(f"{times} repeats of at least 2 tokens do not fit into --length {length}")
        segment = rng.choices(self._alphabet, k=period)
        return torch.tensor(self._prefix + segment * times), period, start

    @cached_property
    def _alphabet(self) -> list[int]:
        if self.loaded.tokenizer is None:
            return list(range(33, 127))
        special = set(self.loaded.tokenizer.all_special_ids)
        size = min(len(self.loaded.tokenizer), self.loaded.config.vocab_size)
        return [i for i in range(size) if i not in special]

    # -- text ------------------------------------------------------------------------------------------------------

    def windows(self, length: int, count: int, least: int = 2) -> Tensor:
        """[windows, n] of the text, spread evenly; n is `length`, or all of a text that is shorter."""
        ids = self._ids
        if len(ids) < least:
            raise ValueError(
                f"{self.where} has {len(ids)} tokens; at least {least} are needed: "
                "give a longer one or a smaller --length"
            )
        prefix = self._prefix
        body = min(length - len(prefix), len(ids))
        fit = max(1, min(count, len(ids) // body))
        starts = [i * (len(ids) - body) // max(1, fit - 1) for i in range(fit)]
        return torch.tensor([prefix + ids[start : start + body] for start in starts])

    @cached_property
    def _ids(self) -> list[int]:
        return self._library if self._text is None else self.loaded.encode(self._text)

    @cached_property
    def _library(self) -> list[int]:
        from manyheads.tasks.text import standard_library, texts

        data = bytes(texts(standard_library(), 4_000_000)[1].tolist())[:_HAYSTACK_BYTES]
        return self.loaded.encode(data.decode("ascii", errors="ignore").replace("\0", "\n"))

    def _stretch(self, rng: random.Random, size: int) -> list[int]:
        library = self._library
        while len(library) <= size:
            library = library + library
        start = rng.randint(0, len(library) - size - 1)
        return library[start : start + size]

    @cached_property
    def _prefix(self) -> list[int]:
        """The token that the tokenizer puts in front of every text, if it does."""
        tokenizer = self.loaded.tokenizer
        first = None if tokenizer is None else tokenizer.bos_token_id
        return (
            [first]
            if tokenizer is not None and first is not None and tokenizer("a")["input_ids"][:1] == [first]
            else []
        )

    @cached_property
    def _between(self) -> list[int]:
        return self.loaded.encode(".")
