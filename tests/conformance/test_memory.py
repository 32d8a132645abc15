"""What a card says of the cost must be so: below n^2, no tensor of a pass and its gradients holds all pairs."""

import inspect
import re
from typing import Any

import pytest
import torch

from manyheads import list_attentions, mechanism_class
from manyheads.card import Pattern
from manyheads.testing import LargestTensor

N, DIM, HEADS = 4096, 16, 4
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


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_no_matrix_of_all_pairs(name: str, pattern: Pattern) -> None:
    cls, options = mechanism_class(name), inspect.signature(mechanism_class(name)).parameters
    example = cls.card.example
    config: dict[str, Any] = {
        key: example[key] for key, p in options.items() if p.default is p.empty and key in example
    }
    config |= {"max_length": N} if "max_length" in options else {}
    config = {"heads": example.get("heads", HEADS), **config}
    module = cls(DIM, causal=pattern.causal, **config)
    x = torch.randn(1, N, DIM, requires_grad=True)
    context = torch.randn(1, N, DIM, requires_grad=True) if pattern.cross else None
    with LargestTensor() as largest:
        module(x, context).output.sum().backward()
    # Room for blocks and windows as wide as they are by default.
    assert largest.size <= 0.75 * N * N


@pytest.mark.parametrize("time", ["n", "n w", "n^2 / block + n block top_k", "n m / stride", "m + n log m", "n + k^2"])
def test_these_are_below(time: str) -> None:
    assert below_all_pairs(time)


@pytest.mark.parametrize("time", ["n^2", "n^2 heads", "n m", "n (n + m)", "n m + n^2", "n w + n^2"])
def test_these_are_not(time: str) -> None:
    assert not below_all_pairs(time)


def test_enough_mechanisms_are_held_to_it() -> None:
    assert len(CASES) >= 40
