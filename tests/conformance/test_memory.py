"""What a card says of the cost must be so: below n^2, no tensor of a pass and its gradients holds all pairs."""

import inspect
import re
from typing import Any

import pytest
import torch

from manyheads import list_attentions, mechanism_class
from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.testing import LargestTensor

# The longer ones for those whose windows are, by default, as wide as the shortest nearly. One head where that is taken:
# its n^2 are all pairs, and what four hold in windows and blocks is more of n^2.
LENGTHS, DIM, HEADS = (1024, 2048, 4096), 16, (1, 4)
SEQUENCES = [p for p in Pattern if p.value.endswith(("self", "cross")) and p is not Pattern.GRID_CROSS]


def below_all_pairs(time: str) -> bool:
    """n^2 or n m, unless divided by something."""
    return not re.search(r"n\^2(?! /)|n m(?! /)|\(n \+ m\)", time)


CASES = [
    (name, pattern)
    for name in list_attentions()
    for pattern in sorted(mechanism_class(name).card.patterns & set(SEQUENCES))
    if below_all_pairs(mechanism_class(name).card.time)
]


def holds_all_pairs(cls: type[Mechanism], pattern: Pattern, n: int) -> bool:
    """In a pass and its gradients, leaving room for blocks and windows as wide as they are by default."""
    module = built(cls, pattern, n)
    x = torch.randn(1, n, DIM, requires_grad=True)
    context = torch.randn(1, n, DIM, requires_grad=True) if pattern.cross else None
    with LargestTensor() as largest:
        module(x, context).output.sum().backward()
    return largest.size > 0.75 * n * n


def built(cls: type[Mechanism], pattern: Pattern, n: int) -> Mechanism:
    options, example = inspect.signature(cls).parameters, cls.card.example
    config: dict[str, Any] = {
        key: example[key] for key, p in options.items() if p.default is p.empty and key in example
    }
    config |= {"max_length": n} if "max_length" in options else {}
    for heads in HEADS:
        try:
            return cls(DIM, causal=pattern.causal, heads=heads, **config)
        except ValueError:
            if heads == HEADS[-1]:
                raise
    raise AssertionError


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_no_matrix_of_all_pairs(name: str, pattern: Pattern) -> None:
    assert not all(holds_all_pairs(mechanism_class(name), pattern, n) for n in LENGTHS)


def test_a_matrix_of_all_pairs_is_found() -> None:
    assert all(holds_all_pairs(mechanism_class("shaw"), Pattern.CAUSAL_SELF, n) for n in LENGTHS[:1])


@pytest.mark.parametrize("time", ["n", "n w", "n^2 / block + n block top_k", "n m / stride", "m + n log m", "n + k^2"])
def test_these_are_below(time: str) -> None:
    assert below_all_pairs(time)


@pytest.mark.parametrize("time", ["n^2", "n^2 heads", "n m", "n (n + m)", "n m + n^2", "n w + n^2"])
def test_these_are_not(time: str) -> None:
    assert not below_all_pairs(time)


def test_enough_mechanisms_are_held_to_it() -> None:
    assert len(CASES) >= 40
