"""Selective copying: remember what matters, skip what does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator

from manyheads.tasks.draw import distinct, uniform
from manyheads.tasks.task import IGNORED, MAX_LENGTH, MAX_VOCABULARY, Batch, Generated, register_task, whole

BLANK, DELIMITER = 0, 1


@register_task
@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Generated):
    """`tokens` tokens stand at random places among blanks; after that, copy them in order.

    Input: n - tokens places of blanks (0) and data (2..vocabulary-1, repeats allowed), then `tokens` delimiters (1);
    the target at the i-th delimiter is the i-th datum. The answers are not fed back in: the model has to count.
    Chance is 1/(vocabulary - 2). Source: the selective copying of arXiv:2312.00752, whose length of 4096 is n=4096.
    """

    name: ClassVar[str] = "selective-copy"
    title: ClassVar[str] = "Selective copy"
    pattern: ClassVar[str] = "causal-self"

    n: int = 128
    vocabulary: int = 16
    tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "n", self.n, 2, MAX_LENGTH)
        whole(self, "vocabulary", self.vocabulary, 4, MAX_VOCABULARY, "blank, delimiter and at least two data tokens")
        whole(self, "tokens", self.tokens, 1, self.n // 2, f"2 tokens <= n for n={self.n}")

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": self.vocabulary, "max_length": self.n}

    def sample(self, count: int, rng: Generator) -> Batch:
        body = self.n - self.tokens
        data = uniform(count, self.tokens, DELIMITER + 1, self.vocabulary, rng)
        places = distinct(count, self.tokens, 0, body, rng).sort(1).values
        tokens = torch.full((count, self.n), BLANK)
        tokens.scatter_(1, places, data)
        tokens[:, body:] = DELIMITER
        targets = torch.full_like(tokens, IGNORED)
        targets[:, body:] = data
        return Batch({"input_ids": tokens}, targets)
