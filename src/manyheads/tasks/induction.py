"""Induction: what came after this token the last time?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator

from manyheads.tasks.draw import distinct
from manyheads.tasks.task import IGNORED, MAX_LENGTH, MAX_VOCABULARY, Batch, Generated, register_task, whole


@register_task
@dataclass(frozen=True, kw_only=True)
class Induction(Generated):
    """... A B ... A -> B on random tokens: at the second A, name the token that followed the first.

    The tokens are a random draw without replacement, so no answer is ambiguous (vocabulary >= n is needed). Then
    `queries` positions of the second half, drawn at random, are overwritten with tokens of the first half, and the
    target there is what follows that token in the first half. Any token may be asked for: there are no marked keys and
    no pairs, and distances are random, so neither a fixed offset nor an alphabet gives the answer away. Chance is
    1/vocabulary. Source: the induction heads of arXiv:2209.11895, asked several times a sequence.
    """

    name: ClassVar[str] = "induction"
    title: ClassVar[str] = "Induction (A B ... A -> B)"
    pattern: ClassVar[str] = "causal-self"

    n: int = 64
    vocabulary: int = 256
    queries: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "n", self.n, 4, MAX_LENGTH)
        whole(self, "vocabulary", self.vocabulary, self.n, MAX_VOCABULARY, f"no token twice in n={self.n}")
        whole(self, "queries", self.queries, 1, self.n // 2 - 1, f"at most n/2 - 1 for n={self.n}")

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": self.vocabulary, "max_length": self.n}

    def sample(self, count: int, rng: Generator) -> Batch:
        half = self.n // 2
        tokens = distinct(count, self.n, 0, self.vocabulary, rng)
        first = distinct(count, self.queries, 0, half - 1, rng)
        second = distinct(count, self.queries, half, self.n, rng)
        answers = tokens.gather(1, first + 1)
        tokens.scatter_(1, second, tokens.gather(1, first))
        targets = torch.full_like(tokens, IGNORED).scatter_(1, second, answers)
        return Batch({"input_ids": tokens}, targets)
