"""Lookup: one sequence holds the pairs, the other asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator

from manyheads.tasks.draw import distinct, uniform
from manyheads.tasks.task import MAX_LENGTH, MAX_VOCABULARY, Batch, Generated, register_task, whole


@register_task
@dataclass(frozen=True, kw_only=True)
class Lookup(Generated):
    """The encoder reads k1 v1 k2 v2 ... (n tokens), the decoder the same keys in another order: name each one's value.

    Keys are distinct of 0..V/2-1, values any of V/2..V-1 (V = vocabulary), every key is asked for once. All questions
    are there at once and no answer is fed back, so that nothing about the decoder needs to be causal. Chance is 2/V.
    """

    name: ClassVar[str] = "lookup"
    title: ClassVar[str] = "Lookup (key-value pairs in the other sequence)"
    pattern: ClassVar[str] = "noncausal-cross"
    head: ClassVar[str] = "seq2seq-lm"

    n: int = 32
    vocabulary: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "n", self.n, 2, MAX_LENGTH)
        if self.n % 2:
            raise ValueError(f"lookup: n={self.n}; want an even length, a key and a value for each pair")
        whole(self, "vocabulary", self.vocabulary, max(4, self.n), MAX_VOCABULARY, f"a key for each pair of n={self.n}")

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": self.vocabulary, "max_length": self.n, "decoder_causal": False}

    def sample(self, count: int, rng: Generator) -> Batch:
        pairs, half = self.n // 2, self.vocabulary // 2
        keys = distinct(count, pairs, 0, half, rng)
        values = uniform(count, pairs, half, self.vocabulary, rng)
        order = distinct(count, pairs, 0, pairs, rng)
        inputs = {
            "input_ids": torch.stack([keys, values], dim=2).flatten(1),
            "decoder_input_ids": keys.gather(1, order),
        }
        return Batch(inputs, values.gather(1, order))
