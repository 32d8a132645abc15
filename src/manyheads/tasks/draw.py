"""Random draws that the tasks share. All of them go through a generator whose seed is a hash of what it is for."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor


def generator(*purpose: str | int) -> Generator:
    """A generator of its own for `purpose`, such as ("recall", "train", 3): no seed collides with another purpose."""
    digest = hashlib.sha256("\0".join(str(part) for part in purpose).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def distinct(rows: int, count: int, low: int, high: int, rng: Generator) -> Tensor:
    """[rows, count] of low..high-1: each row an ordered draw without replacement, all orders equally likely."""
    if count * count <= 2 * (high - low):  # few of many: draw rows with replacement until none repeats a number
        drawn = uniform(rows, count, low, high, rng)
        while (again := _repeats(drawn)).any():
            drawn[again] = uniform(int(again.sum()), count, low, high, rng)
        return drawn
    return torch.rand(rows, high - low, generator=rng).topk(count, sorted=True).indices + low


def _repeats(rows: Tensor) -> Tensor:
    ordered = rows.sort(1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(1)


def distinct_weighted(rows: int, count: int, weights: Tensor, rng: Generator) -> Tensor:
    """[rows, count] of 0..len(weights)-1, drawn one after another without replacement, each time in proportion to the
    weights that are left. Arrival times with rates `weights` come in just that order, so it takes no loop."""
    arrivals = torch.empty(rows, len(weights), dtype=torch.float64).exponential_(generator=rng) / weights.double()
    return arrivals.topk(count, largest=False, sorted=True).indices


def uniform(rows: int, count: int, low: int, high: int, rng: Generator) -> Tensor:
    """[rows, count] of low..high-1, independent."""
    return torch.randint(low, high, (rows, count), generator=rng)
