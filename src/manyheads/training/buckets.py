"""Batches of pairs that are alike in two lengths, speech and its text, each as large as memory allows.

An example is a pair (n, m): input frames and output tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from manyheads.runs.memory import is_shortage, memory_meter, trim_memory

Pair = tuple[int, int]


class Bucket(NamedTuple):
    """Upper bounds: of the inputs and of the outputs."""

    inputs: int
    outputs: int


def length_buckets(pairs: Sequence[Pair], inputs: int, outputs: int = 1) -> list[Bucket]:
    """At most inputs x outputs buckets: bins of input lengths that hold equal sums of input, and within each of output
    lengths that hold equal sums of output. Bounds are lengths that occur; equal ones are one bucket.

    Source: 1-D and 2-D bins of NeMo's estimate_duration_bins scripts, which train Canary (arXiv:2503.05931). Theirs
    drop pairs of too many tokens per second; drop them before.
    """
    _check(pairs)
    for what, value in (("inputs", inputs), ("outputs", outputs)):
        if value < 1:
            raise ValueError(f"length_buckets: {what}={value} was given; want 1 or more")
    found: list[Bucket] = []
    left = sorted(pairs)
    for bound in _bounds([n for n, _ in left], inputs):
        here = [pair for pair in left if pair[0] <= bound]
        left = left[len(here) :]
        found += [Bucket(bound, m) for m in _bounds([m for _, m in here], outputs)]
    return found


def _check(pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise ValueError("length_buckets: no pairs were given; want (inputs, outputs) of each example")
    for number, (n, m) in enumerate(pairs):
        if n < 1 or m < 1:
            raise ValueError(f"length_buckets: pair {number} is ({n}, {m}); want lengths of 1 or more")


def _bounds(lengths: list[int], count: int) -> list[int]:
    """Lengths that cut the sum of all into equal parts, each once, the longest among them."""
    lengths, total, done = sorted(lengths), sum(lengths), 0
    found: list[int] = []
    for length in lengths:
        done += length
        if done * count >= total * (len(found) + 1):
            found.append(length)
            while len(found) < count and done * count >= total * (len(found) + 1):
                found.append(length)
    return sorted({*found, lengths[-1]})


def bucket_of(pair: Pair, buckets: Sequence[Bucket]) -> Bucket:
    """The tightest that holds the pair: of the least inputs, then outputs. ValueError where none does."""
    holding = [bucket for bucket in buckets if pair[0] <= bucket.inputs and pair[1] <= bucket.outputs]
    if not holding:
        raise ValueError(
            f"bucket_of: a pair of {pair} fits into none of {list(buckets)}; make them of these lengths too"
        )
    return min(holding)


def measured_peak(step: Callable[[int, Bucket], object], device: torch.device | str = "cpu") -> Callable[..., int]:
    """(batch, bucket) -> bytes above what is held before that step(batch, bucket) takes, of its second run: the first
    one makes the optimizer's state."""
    device, begun = torch.device(device), list[bool]()

    def peak(batch: int, bucket: Bucket) -> int:
        if not begun:
            step(1, bucket)
            begun.append(True)
        trim_memory()
        meter = memory_meter(device)
        step(batch, bucket)
        return meter.peak()

    return peak


def batch_sizes(
    buckets: Sequence[Bucket],
    peak: Callable[[int, Bucket], int],
    room: int,
    *,
    close: float = 0.05,
    most: int = 1 << 16,
) -> dict[Bucket, int]:
    """For each bucket how many examples of its upper bounds a step takes within `room` bytes, by trying.

    peak: `measured_peak` of a whole step, forward, backward and optimizer; running out of memory is too much. Batches
    double until one is too large, then the gap is halved until it is below `close` of the batch. ValueError where one
    example does not fit. Source: NeMo's OOMptimizer, which goes by errors alone.
    """
    if not 0 < close < 1 or room < 1 or most < 1:
        raise ValueError(f"batch_sizes: close={close}, room={room}, most={most}; want 0 < close < 1, and 1 or more")
    return {bucket: _largest(partial(_fits, peak, bucket, room), bucket, room, close, most) for bucket in buckets}


def _fits(peak: Callable[[int, Bucket], int], bucket: Bucket, room: int, batch: int) -> bool:
    try:
        return peak(batch, bucket) <= room
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        return False


def _largest(fits: Callable[[int], bool], bucket: Bucket, room: int, close: float, most: int) -> int:
    if not fits(1):
        raise ValueError(
            f"batch_sizes: one example of {tuple(bucket)} takes more than {room} bytes; give more, or drop it"
        )
    good, bad = 1, 2
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    if bad > most:
        return good
    while bad - good > max(1, close * good):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


class BucketBatches:
    """Batches of numbers of examples for a DataLoader's `batch_sampler`, each of one bucket, in random order over all:
    buckets in turn would tie length to time. Every example comes once an epoch; each `iter` is another epoch, the one
    that `set_epoch` says where it was called since: accelerate and Trainer do, so that a run that goes on from a
    checkpoint in the middle of an epoch has that epoch's batches."""

    def __init__(self, pairs: Sequence[Pair], sizes: dict[Bucket, int], *, seed: int = 0) -> None:
        _check(pairs)
        buckets = list(sizes)
        self.pairs, self.sizes, self.seed, self.epoch = list(pairs), dict(sizes), seed, 0
        self._members: dict[Bucket, list[int]] = {bucket: [] for bucket in buckets}
        for number, pair in enumerate(self.pairs):
            self._members[bucket_of(pair, buckets)].append(number)

    def __len__(self) -> int:
        return sum(-(-len(members) // self.sizes[bucket]) for bucket, members in self._members.items())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        drawn = random.Random(f"{self.seed} {self.epoch}")
        self.epoch += 1
        batches = []
        for bucket, members in self._members.items():
            order, size = drawn.sample(members, len(members)), self.sizes[bucket]
            batches += [order[start : start + size] for start in range(0, len(order), size)]
        drawn.shuffle(batches)
        return iter(batches)


def padding_share(pairs: Sequence[Pair], batches: Iterable[list[int]]) -> tuple[float, float]:
    """The share of padding in the inputs and in the outputs: 1 - sum of lengths / sum of longest x size of batches."""
    real, room = [0, 0], [0, 0]
    for batch in batches:
        for side in (0, 1):
            lengths = [pairs[number][side] for number in batch]
            real[side] += sum(lengths)
            room[side] += max(lengths) * len(lengths)
    return 1 - real[0] / room[0], 1 - real[1] / room[1]
