"""Several policies on one cache: each does what it does alone, and what they would undo for each other is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorder import feed, feed_dense, held, recording
from test_context import padded
from tiny_families import prompt, tiny

from manyheads.shrink import (
    H2O,
    TOVA,
    AdaKV,
    Composed,
    ExpectedAttention,
    Full,
    KeyNorm,
    Policy,
    Quantised,
    SnapKV,
    StreamingLLM,
    TidalDecode,
)

ENDS = [30, *range(31, 36), 42, 43]
BOTH: list[tuple[Policy, Policy]] = [
    (SnapKV(compression_ratio=0.5, window_size=3, allocation=AdaKV()), TOVA(budget_tokens=10, when="decode")),
    (KeyNorm(budget_tokens=20, when="passes"), H2O(budget_tokens=12, when="decode", interval=2)),
    (H2O(budget_tokens=14), StreamingLLM(budget_tokens=10, sink_size=2, positions="text")),
    (H2O(budget_tokens=14, interval=3), ExpectedAttention(budget_tokens=10, sink_size=2, interval=3)),
]


@pytest.mark.parametrize(("family", "rows"), [("llama", 1), ("gemma2", 2)])
@pytest.mark.parametrize("both", BOTH, ids=lambda own: type(own[0]).__name__ + type(own[1]).__name__)
def test_logits_are_those_of_what_is_held(both: Any, rows: int, family: str) -> None:
    model, tokens, padding = tiny(family), prompt(rows, ENDS[-1]), padded(rows, ENDS[-1])
    cache = Composed(*both).make_cache(model)
    with recording() as steps:
        given = feed(model, cache, tokens, padding, ENDS)
    wanted = feed_dense(model, steps, tokens, padding, ENDS)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


def test_each_acts_at_its_moment() -> None:
    model, tokens, padding = tiny("llama"), prompt(1, 40), padded(1, 40)
    first, second = SnapKV(budget_tokens=16, window_size=3), TOVA(budget_tokens=10, interval=1, when="decode")
    cache, alone = Composed(first, second).make_cache(model), first.make_cache(model)
    for own in (cache, alone):
        feed(model, own, tokens, padding, [30])
    assert [held(layer) for layer in cache.layers] == [held(layer) for layer in alone.layers]
    feed_on = [cache.lengths()[0][0]]
    for i in range(30, 34):
        model(tokens[:, i : i + 1], past_key_values=cache)
        feed_on.append(cache.lengths()[0][0])
    assert feed_on == [16, 10, 10, 10, 10]


def test_the_tightest_budget_holds() -> None:
    model = tiny("llama")
    for both in ((KeyNorm(budget_tokens=8), H2O(budget_tokens=12)), (H2O(budget_tokens=12), KeyNorm(budget_tokens=8))):
        cache = Composed(*both).make_cache(model)
        feed(model, cache, prompt(1, 30), padded(1, 30), [30])
        assert cache.lengths() == [[8, 8]] * 3
    assert Composed(Full(), KeyNorm()).is_full


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((KeyNorm(budget_tokens=8),), "two policies or more"),
        ((KeyNorm(budget_tokens=8), 3), "two policies or more"),
        ((KeyNorm(budget_tokens=8), TidalDecode(budget_tokens=8)), "TidalDecode drops nothing"),
        ((KeyNorm(budget_tokens=8), Composed(KeyNorm(), TOVA())), "parts of its own"),
        ((StreamingLLM(budget_tokens=8), ExpectedAttention(budget_tokens=8)), "in their own way"),
        ((H2O(budget_tokens=8), H2O(budget_tokens=9)), "the same notes"),
        ((KeyNorm(allocation=AdaKV()), TOVA(allocation=AdaKV())), "share out a budget"),
        ((KeyNorm(storage=Quantised()), TOVA(storage=Quantised())), "as codes"),
    ],
)
def test_what_is_refused(parts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Composed(*parts)
