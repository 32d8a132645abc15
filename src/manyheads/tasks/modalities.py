"""Two kinds of token in one sequence, told apart by what the model is given beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.tasks.draw import generator, uniform
from manyheads.tasks.task import IGNORED, MAX_LENGTH, Batch, Generated, register_task, whole

SHORTEST, LONGEST = 4, 12
KINDS = 2


@register_task
@dataclass(frozen=True, kw_only=True)
class Modalities(Generated):
    """Spans of two modalities take turns, over the same symbols: predict each next token of the span.

    Kind 0 goes on as text does, with f_0 of the last token; kind 1 as rows of a picture do, with f_1 of the last but
    one. f_0 and f_1 are fixed permutations of the symbols, the same for all seeds, to be learned. Spans are of 4 to 12
    tokens and begin at random, in either kind; asked is what follows from the span itself. token_kinds [b, n] goes
    beside the tokens; who does not read it has to tell from the tokens before which kind a span is of. Chance is
    1 / symbols. A made-up stand-in for the mixed text and image tokens of arXiv:2411.04996.
    """

    name: ClassVar[str] = "modalities"
    title: ClassVar[str] = "Spans of two modalities over the same symbols"
    pattern: ClassVar[str] = "causal-self"
    beside: ClassVar[tuple[str, ...]] = ("token_kinds",)

    n: int = 64
    symbols: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "n", self.n, 2, MAX_LENGTH)
        whole(self, "symbols", self.symbols, 2, 4096)

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": self.symbols, "max_length": self.n, "num_token_kinds": KINDS}

    def sample(self, count: int, rng: Generator) -> Batch:
        kinds, place = _spans(count, self.n + 1, rng)
        tokens, tables = uniform(count, self.n + 1, 0, self.symbols, rng), rules(self.symbols)
        told = place > kinds  # a rule looks back one token, or two
        for at in range(1, self.n + 1):
            back = [tokens[:, at - 1], tokens[:, max(at - 2, 0)]]
            follows = torch.where(kinds[:, at] == 0, tables[0][back[0]], tables[1][back[1]])
            tokens[:, at] = torch.where(told[:, at], follows, tokens[:, at])
        targets = tokens[:, 1:].masked_fill(~told[:, 1:], IGNORED)
        inputs = {"input_ids": tokens[:, :-1].contiguous(), "token_kinds": kinds[:, :-1].contiguous()}
        return Batch(inputs, targets)


def _spans(count: int, n: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """The kind of each token [count, n], and its place in its span, from 0 on."""
    most = n // SHORTEST + 1
    ends = uniform(count, most, SHORTEST, LONGEST + 1, rng).cumsum(1)
    at = torch.arange(n).expand(count, n).contiguous()
    span = torch.searchsorted(ends, at, right=True)
    begins = torch.cat([torch.zeros(count, 1, dtype=torch.long), ends], 1).gather(1, span)
    return (uniform(count, 1, 0, KINDS, rng) + span) % KINDS, at - begins


@lru_cache(maxsize=8)
def rules(symbols: int) -> Tensor:
    """f_0 and f_1, [2, symbols]."""
    rng = generator("modalities", "rules", symbols)
    return torch.stack([torch.randperm(symbols, generator=rng) for _ in range(KINDS)])
