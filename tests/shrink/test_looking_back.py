"""Policies whose rule asks for several queries, while decoding: the latest are kept for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import ENDS, LEFT, batch, best, moments, watched
from recorder import feed_dense, held
from tiny_families import prompt, shallow, tiny

from manyheads.shrink import TOVA, AdaKV, ChunkKV, Composed, CriticalKV, KeyNorm, SnapKV, release

SIZE, BUDGET = 3, 11


@pytest.mark.parametrize("when", ["decode", "both"])
@pytest.mark.parametrize("interval", [1, 2])
def test_the_latest_queries_of_several_tokens(when: str, interval: int) -> None:
    """By loops: mean attention of the last SIZE queries of all passes to what is held."""
    model, (tokens, padding) = tiny("llama").double(), batch()
    policy = SnapKV(budget_tokens=BUDGET, window_size=SIZE, kernel_size=1, when=when, interval=interval)
    steps, values, given = watched(model, policy, tokens, padding, ENDS)
    decided = 0
    for layer, own in steps.items():
        asked = [query for step in own for query in step.queries.unbind(2)]
        for turn, step in enumerate(own):
            seen = ENDS[turn]
            for row, heads in enumerate(moments(own, values[layer], layer, turn)):
                # One row may be shorter: heads are cut together, where the longest is an interval over.
                longest = max(len(step.during[at, 0]) for at in range(2))
                for head, now in enumerate(heads):
                    kept = [slot for slot in step.after[row, head] if slot >= LEFT[row]]
                    if (not now.decoding and when == "decode") or longest - BUDGET < (interval if now.decoding else 1):
                        assert kept == now.held
                        continue
                    votes = dict.fromkeys(now.held, 0.0)
                    places = [place for place in range(seen - SIZE, seen) if place >= LEFT[row]]
                    for place in places:
                        for query in asked[place][row, 2 * head : 2 * head + 2]:
                            for slot, weight in now.look(query, place).items():
                                votes[slot] += weight / 2 / len(places)
                    votes |= {slot: 9.0 for slot in now.held if slot >= seen - SIZE}
                    assert kept == sorted(best(votes, BUDGET))
                    decided += now.decoding
    assert decided
    wanted = feed_dense(tiny("llama").double(), steps, tokens, padding, ENDS)
    torch.testing.assert_close(given, wanted, atol=1e-6, rtol=1e-6)
    release(model)


POLICIES: list[Any] = [
    SnapKV(budget_tokens=12, window_size=4, when="decode", interval=4),
    SnapKV(budget_tokens=12, window_size=4, when="both", allocation=AdaKV()),
    CriticalKV(base=SnapKV(window_size=4), budget_tokens=12, when="both", interval=2),
    ChunkKV(base=SnapKV(window_size=4), chunk_length=3, budget_tokens=14, when="decode"),
    Composed(KeyNorm(budget_tokens=20, when="prefill"), SnapKV(budget_tokens=12, window_size=4, when="decode")),
    Composed(TOVA(budget_tokens=14), SnapKV(budget_tokens=12, window_size=4, when="both", interval=2)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda own: type(own).__name__)
def test_beams_guesses_and_bytes(policy: Any) -> None:
    model, tokens = shallow("llama"), prompt(2, 24)
    with policy(model) as active:
        alone = model.generate(tokens[:1], max_new_tokens=10, do_sample=False)
        cache = active.cache
        assert max(max(own) for own in cache.lengths()) < 20
        kept = [done.queries for layer in cache.layers for done in layer.heard]
        assert 0 < sum(own.shape[3] for own in kept) <= 2 * 4
        stores = sum(layer.store.nbytes + sum(own.nbytes for own in layer.memo.values()) for layer in cache.layers)
        assert cache.nbytes == stores + sum(own.untyped_storage().nbytes() for own in kept)
        guessed = model.generate(tokens[:1], max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(alone, guessed)
        both = model.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False)
        one = model.generate(tokens[:1], max_new_tokens=5, num_beams=3, do_sample=False)
        assert torch.equal(both[0, : one.shape[1]], one[0])


def test_a_context_alone_keeps_no_queries() -> None:
    model = tiny("llama")
    cache = SnapKV(budget_tokens=12, window_size=4).make_cache(model)
    with torch.no_grad():
        model(prompt(1, 24), past_key_values=cache)
        model(prompt(1, 1), past_key_values=cache)
    assert all(not layer.heard for layer in cache.layers)
    assert all(len(own) == 13 for layer in cache.layers for own in held(layer).values())
