"""A policy of prefill drops from the context once; a question, a second turn and what is decoded stay whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from recorder import feed, held
from test_nothing_to_drop import SMALL
from tiny_families import prompt, shallow
from torch import Tensor

from manyheads.shrink import MoA, Policy, SnapKV, release

CONTEXT, QUESTION = 30, 9
# Context, question, two tokens, a second turn.
ENDS = [CONTEXT, CONTEXT + QUESTION, CONTEXT + QUESTION + 1, CONTEXT + QUESTION + 2, CONTEXT + QUESTION + 8]
BUDGETS: list[dict[str, Any]] = [{"compression_ratio": 0.5}, {"budget_tokens": 12}]


def cases() -> list[Any]:
    """A ratio of one row, and a number of entries in two rows of which one is padded."""
    found = [pytest.param(cls, own | some, rows, id=f"{cls.__name__}-{next(iter(some))}-{rows}")
             for cls, own in SMALL.items() for rows, some in enumerate(BUDGETS, 1)]  # fmt: skip
    return [*found, *(pytest.param(MoA, {"rule": (3, 0.2), "sink_size": 1}, rows, id=f"MoA-{rows}") for rows in (1, 2))]


def padded(rows: int, length: int) -> Tensor:
    padding = torch.ones(rows, length, dtype=torch.long)
    padding[-1, : 3 * (rows - 1)] = 0
    return padding


def slots(cache: Any) -> list[dict[tuple[int, int], list[int]]]:
    return [held(layer) for layer in cache.layers]


@pytest.mark.parametrize(("cls", "settings", "rows"), cases())
def test_what_follows_the_context_stays(cls: type[Policy], settings: dict[str, Any], rows: int) -> None:
    model = shallow("llama")
    tokens, padding = prompt(rows, ENDS[-1]), padded(rows, ENDS[-1])
    cache = cls(**settings, when="prefill").make_cache(model)
    feed(model, cache, tokens, padding, ENDS[:1])
    kept = slots(cache)
    assert max(len(own) for layer in kept for own in layer.values()) <= CONTEXT
    assert min(len(own) for layer in kept for own in layer.values()) < CONTEXT - 3
    for start, end in pairwise(ENDS):
        positions = (padding.cumsum(1) - 1).clamp_min(0)[:, start:end]
        with torch.no_grad():
            model(tokens[:, start:end], attention_mask=padding[:, :end], position_ids=positions, past_key_values=cache)
        wanted = [{head: [*own, *range(CONTEXT, end)] for head, own in layer.items()} for layer in kept]
        assert slots(cache) == wanted


def test_every_pass_competes_where_it_is_asked_for() -> None:
    model = shallow("llama")
    tokens, padding = prompt(1, ENDS[-1]), padded(1, ENDS[-1])
    lengths = {}
    for when in ("prefill", "passes"):
        cache = SnapKV(compression_ratio=0.5, window_size=3, when=when).make_cache(model)
        feed(model, cache, tokens, padding, ENDS[:2])
        lengths[when] = cache.lengths()[0][0]
    assert lengths == {"prefill": CONTEXT // 2 + QUESTION, "passes": (CONTEXT + QUESTION) // 2}


@pytest.mark.parametrize("way", ["block", "cache"])
def test_a_prompt_in_chunks_is_one_context(way: str) -> None:
    """In whatever chunks it comes, each is dropped from; then a second turn stays whole."""
    model, tokens = shallow("llama"), prompt(2, CONTEXT)
    policy = SnapKV(budget_tokens=8, window_size=3)
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    if way == "block":
        with policy(model) as active:
            told = model.generate(tokens, prefill_chunk_size=7, **settings)
            more = torch.cat([told, prompt(2, QUESTION, seed=3)], 1)
            cache: Any = active.cache
            assert cache.lengths() == [[8 + 3] * 2] * 2
            model.generate(more, past_key_values=cache, prefill_chunk_size=7, **settings)
    else:
        cache = policy.make_cache(model)
        cache.expect(CONTEXT)
        for chunk in tokens.split(7, 1):
            model(chunk, past_key_values=cache)
        assert cache.lengths() == [[8] * 2] * 2
        for length in (4, QUESTION, 3):
            model(prompt(2, length), past_key_values=cache)
        release(model)
    assert cache.lengths() == [[8 + 4 + QUESTION + 3] * 2] * 2


def test_a_context_is_told_before_it_comes() -> None:
    model = shallow("llama")
    cache = SnapKV(budget_tokens=8, window_size=3).make_cache(model)
    model(prompt(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 20 tokens"):
        cache.expect(40)
    cache.reset()
    cache.expect(40)
    for _ in range(2):
        model(prompt(1, 20), past_key_values=cache)
    assert cache.lengths() == [[8, 8]] * 2
