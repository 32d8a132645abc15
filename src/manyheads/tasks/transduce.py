"""Transduction: reverse, sort or copy a sequence with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.tasks.draw import uniform
from manyheads.tasks.task import MAX_LENGTH, MAX_VOCABULARY, Batch, Generated, register_task, whole

BOS = 0
_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse": lambda symbols: symbols.flip(1),
    "sort": lambda symbols: symbols.sort(1).values,
    "copy": lambda symbols: symbols,
}
_FIRST_SYMBOL = 1 + len(_KINDS)


@register_task
@dataclass(frozen=True, kw_only=True)
class Transduce(Generated):
    """The encoder reads n random symbols, the decoder writes them reversed, sorted (by token) or copied.

    kind: "reverse", "sort", "copy", or "mixed", where each example has its own kind and a leading token says which.
    Tokens: 0 begins the decoder's sequence, 1, 2 and 3 ask for reverse, sort and copy (in "mixed" only; the encoder
    then reads n + 1 tokens), symbols are 4..vocabulary-1. The decoder is fed the true answer one place late; targets
    are aligned. Chance is 1/(vocabulary - 4), more for "sort", where the place alone tells something.
    """

    name: ClassVar[str] = "transduce"
    title: ClassVar[str] = "Transduction (reverse, sort, copy)"
    pattern: ClassVar[str] = "causal-cross"
    head: ClassVar[str] = "seq2seq-lm"

    n: int = 32
    vocabulary: int = 32
    kind: str = "reverse"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "n", self.n, 1, MAX_LENGTH)
        whole(
            self, "vocabulary", self.vocabulary, _FIRST_SYMBOL + 2, MAX_VOCABULARY, "4 special and 2 symbols at least"
        )
        if self.kind not in (*_KINDS, "mixed"):
            raise ValueError(f"transduce: kind={self.kind!r}; want one of {[*_KINDS, 'mixed']}")

    def model_settings(self) -> dict[str, Any]:
        length = self.n + (self.kind == "mixed")
        return {"vocab_size": self.vocabulary, "max_length": length, "decoder_causal": True}

    def sample(self, count: int, rng: Generator) -> Batch:
        source = uniform(count, self.n, _FIRST_SYMBOL, self.vocabulary, rng)
        if self.kind == "mixed":
            which = uniform(count, 1, 0, len(_KINDS), rng)
            answers = torch.stack([write(source) for write in _KINDS.values()])
            targets = answers[which[:, 0], torch.arange(count)]
            source = torch.cat([1 + which, source], dim=1)
        else:
            targets = _KINDS[self.kind](source)
        begun = torch.cat([torch.full((count, 1), BOS), targets[:, :-1]], dim=1)
        return Batch({"input_ids": source, "decoder_input_ids": begun}, targets.clone())
