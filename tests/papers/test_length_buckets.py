"""Buckets of two lengths, and the batches that fit into memory."""

import random

import pytest
import torch

from manyheads.training import BucketBatches, batch_sizes, bucket_of, length_buckets, measured_peak, padding_share
from manyheads.training.buckets import Bucket


def speech(count: int = 400) -> list[tuple[int, int]]:
    """Frames, and tokens at a rate that differs from one to the next."""
    drawn = random.Random(0)
    frames = [drawn.randint(20, 600) for _ in range(count)]
    return [(n, max(1, round(n * drawn.uniform(0.02, 0.3)))) for n in frames]


def test_bins_hold_equal_sums() -> None:
    pairs = speech()
    bounds = sorted({bucket.inputs for bucket in length_buckets(pairs, 4)})
    assert len(bounds) == 4
    share = sum(n for n, _ in pairs) / 4
    for low, high in zip([0, *bounds], bounds, strict=False):
        assert sum(n for n, _ in pairs if low < n <= high) == pytest.approx(share, abs=2 * 600)
    assert length_buckets([(5, 2)] * 3, 4, 3) == [Bucket(5, 2)]


def test_every_example_is_in_the_tightest_bucket() -> None:
    pairs = speech()
    buckets = length_buckets(pairs, 4, 3)
    for n, m in pairs:
        found = bucket_of((n, m), buckets)
        assert found.inputs >= n
        assert found.outputs >= m
        assert not any(b.inputs < found.inputs and b.inputs >= n and b.outputs >= m for b in buckets)
    with pytest.raises(ValueError, match=r"fits into none"):
        bucket_of((601, 1), buckets)


def test_two_dimensions_pad_less_than_one_and_one_less_than_none() -> None:
    pairs = speech()

    def share(*counts: int) -> tuple[float, float]:
        return padding_share(pairs, BucketBatches(pairs, dict.fromkeys(length_buckets(pairs, *counts), 8)))

    none, one, two = share(1), share(6), share(6, 3)
    assert none[0] > 2 * one[0]
    assert none[1] > one[1] > 1.5 * two[1]


def test_padding_share_by_hand() -> None:
    assert padding_share([(2, 1), (4, 3), (5, 5)], [[0, 1], [2]]) == (1 - 11 / 13, 1 - 9 / 11)


def test_each_example_once_an_epoch_in_an_order_of_its_own() -> None:
    pairs = speech(100)
    sizes = {bucket: 3 + i for i, bucket in enumerate(length_buckets(pairs, 3, 2))}
    batches = BucketBatches(pairs, sizes)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches)
    for epoch in (first, second):
        assert sorted(number for batch in epoch for number in batch) == list(range(100))
    assert first != second
    assert first == list(BucketBatches(pairs, sizes))
    for batch in first:
        (bucket,) = {bucket_of(pairs[number], list(sizes)) for number in batch}
        assert len(batch) <= sizes[bucket]
    order = [bucket_of(pairs[batch[0]], list(sizes)) for batch in first]
    assert order != sorted(order)


def test_the_largest_batch_within_five_percent() -> None:
    buckets, tried = [Bucket(10, 2), Bucket(100, 30)], []

    def peak(batch: int, bucket: Bucket) -> int:
        tried.append(batch)
        if batch > 900:
            raise MemoryError
        return batch * bucket.inputs * (1 + bucket.outputs) + 77

    found = batch_sizes(buckets, peak, 100_000)
    assert 0.95 * 900 <= found[buckets[0]] <= 900
    assert found[buckets[1]] == (100_000 - 77) // 3100
    assert len(tried) < 40
    with pytest.raises(ValueError, match="one example of"):
        batch_sizes(buckets, peak, 1000)


def test_measured_memory() -> None:
    megabytes = 1 << 20

    def step(batch: int, bucket: Bucket) -> torch.Tensor:
        return torch.ones(batch, bucket.inputs, megabytes // 4).sum()

    (size,) = batch_sizes([Bucket(2, 1)], measured_peak(step), 100 * megabytes).values()
    assert 42 <= size <= 50


@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(3, 0)]])
def test_no_lengths(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="length_buckets"):
        length_buckets(pairs, 2)
