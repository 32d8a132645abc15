"""Multi-query associative recall (MQAR)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.tasks.draw import distinct, distinct_weighted, uniform
from manyheads.tasks.task import IGNORED, MAX_LENGTH, MAX_VOCABULARY, Batch, Generated, register_task, whole


@register_task
@dataclass(frozen=True, kw_only=True)
class Recall(Generated):
    """Key-value pairs k1 v1 k2 v2 ..., then each key once more somewhere later: name its value there.

    Keys are distinct of 1..V/2-1, values distinct of V/2..V-1 (V = vocabulary). After the 2 pairs tokens of context
    stand `space` slots of two tokens; key j goes to the head of slot i, drawn without replacement with probability
    proportional to power_a i^(power_a - 1), i = 1..space: soon after the context more often than late. The target
    stands at the key's own position; the value is not placed in the input. Everything else is a random token of
    0..V-1 (possibly a key or a value, but never asked for), or 0 without random_non_queries. Chance is 2/V.
    Source: arXiv:2312.04927 and zoology's `multiquery_ar`, with the defaults published there. It also wants n even
    and vocabulary > n; both are not needed and not asked for here (an odd n ends with one token more).
    """

    name: ClassVar[str] = "recall"
    title: ClassVar[str] = "Multi-query associative recall (MQAR)"
    pattern: ClassVar[str] = "causal-self"

    n: int = 128
    vocabulary: int = 8192
    pairs: int = 8
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "n", self.n, 4, MAX_LENGTH)
        whole(self, "vocabulary", self.vocabulary, 4, MAX_VOCABULARY)
        whole(self, "pairs", self.pairs, 1, MAX_LENGTH)
        if 4 * self.pairs > self.n:
            raise ValueError(
                f"recall: pairs={self.pairs} do not fit n={self.n}: 4 pairs <= n is needed (two tokens a pair, then "
                f"two a question); want pairs <= {self.n // 4}, or n >= {4 * self.pairs}"
            )
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(
                f"recall: vocabulary={self.vocabulary} has {self.vocabulary // 2 - 1} keys, fewer than "
                f"pairs={self.pairs}; want vocabulary >= {2 * self.pairs + 2}"
            )
        numeric = isinstance(self.power_a, int | float) and not isinstance(self.power_a, bool)
        if not numeric or not math.isfinite(self.power_a) or not 0 < self.power_a <= 100:
            raise ValueError(f"recall: power_a={self.power_a!r}; want a number above 0, at most 100 (1 is uniform)")
        if not isinstance(self.random_non_queries, bool):
            raise ValueError(f"recall: random_non_queries={self.random_non_queries!r}; want true or false")

    @classmethod
    def quick(cls) -> Recall:
        """Small enough to be learnt in seconds on two cores."""
        return cls(n=128, vocabulary=512, pairs=8)

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": self.vocabulary, "max_length": self.n}

    def gap_weights(self) -> Tensor:
        """[space], in proportion to the probability that a key goes to a slot."""
        slots = torch.arange(1, (self.n - 2 * self.pairs) // 2 + 1, dtype=torch.float64)
        return slots ** (self.power_a - 1)

    def sample(self, count: int, rng: Generator) -> Batch:
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = distinct(count, self.pairs, 1, half, rng)
        values = distinct(count, self.pairs, half, self.vocabulary, rng)
        asked = context + 2 * distinct_weighted(count, self.pairs, self.gap_weights(), rng)
        if self.random_non_queries:
            tokens = uniform(count, self.n, 0, self.vocabulary, rng)
        else:
            tokens = torch.zeros(count, self.n, dtype=torch.long)
        tokens[:, 0:context:2] = keys
        tokens[:, 1:context:2] = values
        tokens.scatter_(1, asked, keys)
        targets = torch.full_like(tokens, IGNORED).scatter_(1, asked, values)
        return Batch({"input_ids": tokens}, targets)
