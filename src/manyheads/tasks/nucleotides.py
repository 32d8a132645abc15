"""Next-nucleotide prediction on synthetic genomes, with a length of sequence that grows during training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.tasks.draw import generator, uniform
from manyheads.tasks.task import MAX_LENGTH, Batch, Generated, bits, register_task, whole

BASES = "ACGT"
_ORDER = 3  # the next base depends on so many before it
_FAMILIES, _FAMILY = 8, 48  # repeats that all genomes share, and their length
_MUTATED = 0.05


@register_task
@dataclass(frozen=True, kw_only=True)
class Nucleotides(Generated):
    """Predict the next of A, C, G, T. Scored in bits per base: 2 is a uniform guess, lower is better.

    No genome ships with the package: sequences are SYNTHETIC, and their scores are no one's but this task's. They are
    drawn from a fixed chain in which a base depends on the three before it; over it are laid, at random places, copies
    of eight repeat families of 48 bases that all sequences share, one base in twenty mutated; and the first quarter of
    each sequence, reverse-complemented, stands in the third quarter, likewise mutated, and can only be told by whoever
    looks back half the length. Tokens 0 to 3 are A, C, G, T, then 3 - token is the complement.
    warm_up: stages of the length schedule. With w stages training begins at n / 2^(w-1) and doubles after each
    `stage_batches` batches until n; the batch grows as the sequence shrinks, so that every step has as many tokens.
    Evaluation is at n always. Source: single-nucleotide tokens and the warm-up by stages of length and batch of
    arXiv:2306.15794 (HazyResearch/hyena-dna, `seqlen_warmup_reload.py` and the character tokenizer read at 372625a);
    that doubles from 64; data there are the human reference genome, of which nothing is here.
    """

    name: ClassVar[str] = "nucleotides"
    title: ClassVar[str] = "Nucleotides (synthetic)"
    pattern: ClassVar[str] = "causal-self"
    metric: ClassVar[str] = "bits_per_base"
    higher_is_better: ClassVar[bool] = False

    n: int = 512
    warm_up: int = 1
    stage_batches: int = 50
    eval_examples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "n", self.n, 64, MAX_LENGTH)
        whole(self, "warm_up", self.warm_up, 1, 16)
        whole(self, "stage_batches", self.stage_batches, 1, 1_000_000)
        if self.n % 2 ** (self.warm_up - 1) or self.n >> (self.warm_up - 1) < 64:
            raise ValueError(
                f"nucleotides: warm_up={self.warm_up} halves n={self.n} {self.warm_up - 1} times; want whole lengths "
                "of at least 64: fewer stages, or n a multiple of a higher power of two"
            )

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": len(BASES), "max_length": self.n}

    def sample(self, count: int, rng: Generator) -> Batch:
        return self.at_length(count, self.n, rng)

    def lengths(self) -> list[int]:
        """Of the stages of training."""
        return [self.n >> stage for stage in reversed(range(self.warm_up))]

    def train_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        return self._staged(batch_size, generator(self.name, "train", index(seed)))

    def _staged(self, batch_size: int, rng: Generator) -> Iterator[Batch]:
        *shorter, _ = self.lengths()
        for length in shorter:
            for _ in range(self.stage_batches):
                yield self.at_length(batch_size * (self.n // length), length, rng)
        while True:
            yield self.at_length(batch_size, self.n, rng)

    def at_length(self, count: int, length: int, rng: Generator) -> Batch:
        """`count` sequences of `length` bases with the base after each as its target."""
        bases = self._genomes(count, length + 1, rng)
        return Batch({"input_ids": bases[:, :-1].contiguous()}, bases[:, 1:].contiguous())

    def score(self, logits: Tensor, targets: Tensor) -> tuple[float, int]:
        return bits(*self.asked(logits, targets))

    def entropy(self) -> float:
        """Bits per base of the chain alone, without repeats and copies: what the three bases before one leave open."""
        chain = self._chain[0].double()
        occupied = torch.full((4**_ORDER,), 1 / 4**_ORDER, dtype=torch.float64)
        after = (4 * torch.arange(4**_ORDER)[:, None] + torch.arange(4)) % 4**_ORDER
        for _ in range(200):
            occupied = torch.zeros_like(occupied).index_add_(0, after.flatten(), (occupied[:, None] * chain).flatten())
        return float(-(occupied[:, None] * chain * chain.log()).sum()) / math.log(2)

    @cached_property
    def _chain(self) -> tuple[Tensor, Tensor]:
        """Chances [64, 4] of the next base by the three before it, and the families [8, 48]: the same for everyone."""
        rng = generator(self.name, "genome")
        chances = torch.softmax(1.2 * torch.randn(4**_ORDER, 4, generator=rng), -1)
        return chances, uniform(_FAMILIES, _FAMILY, 0, 4, rng)

    def _genomes(self, count: int, length: int, rng: Generator) -> Tensor:
        chances, families = self._chain
        limits = chances.cumsum(-1)[:, :3].contiguous()
        drawn = torch.rand(length, count, generator=rng)
        bases = torch.empty(length, count, dtype=torch.long)
        context = uniform(1, count, 0, 4**_ORDER, rng)[0]
        for at in range(length):
            base = (drawn[at][:, None] > limits[context]).sum(1)
            bases[at] = base
            context = (4 * context + base) % 4**_ORDER
        sequences = bases.T.contiguous()
        if length > 4 * _FAMILY:
            _laid(sequences, families, rng)
        quarter = length // 4
        copy = _mutated(3 - sequences[:, :quarter].flip(1), rng)
        sequences[:, 2 * quarter : 3 * quarter] = copy
        return sequences


def _laid(sequences: Tensor, families: Tensor, rng: Generator) -> None:
    """Copies of random families at random places, so that they take about a quarter of the bases."""
    count, length = sequences.shape
    for _ in range(max(1, length // (4 * _FAMILY))):
        which = torch.randint(len(families), (count,), generator=rng)
        start = uniform(count, 1, 0, length - _FAMILY + 1, rng)
        sequences.scatter_(1, start + torch.arange(_FAMILY), _mutated(families[which], rng))


def _mutated(bases: Tensor, rng: Generator) -> Tensor:
    hit = torch.rand(bases.shape, generator=rng) < _MUTATED
    return torch.where(hit, torch.randint(4, bases.shape, generator=rng), bases)
