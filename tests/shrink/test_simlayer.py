"""SimLayerKV: which layers are lazy, by loops over their attention, and what these keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import ENDS, Now, batch, check, moments, watched
from tiny_families import prompt, tiny
from torch import Tensor

from manyheads.shrink import AdaKV, Full, SimLayerKV, release

SINKS, RECENT = 2, 6


def share(now: Now, last: int) -> float:
    """Of a row's layer: what both ends of the text before the last queries get, mean over these and all heads."""
    total, asked = 0.0, 0
    ends = {*now.held[:SINKS], *[s for s in now.held if s < now.seen - last][-RECENT:]}
    for head in now.heads:
        for place in range(now.queries.shape[1] - last, now.queries.shape[1]):
            for query in head.queries[:, place]:
                weights = head.look(query, now.since + place)
                total += sum(weight for slot, weight in weights.items() if slot in ends and slot < now.seen - last)
                asked += 1
    return total / asked


@pytest.mark.parametrize("when", ["prefill", "both"])
@pytest.mark.parametrize("last", [1, 3])
def test_lazy_layers(last: int, when: str) -> None:
    # A threshold between what the layers and rows do, so that some are lazy and some are not.
    steps, values, _ = watched(tiny("llama").double(), Full(), *batch(), ENDS)
    rows = [(layer, heads[0]) for layer in steps for heads in moments(steps[layer], values[layer], layer, 0)]
    shares = {(layer, now.row): share(now, last) for layer, now in rows}
    ranked = sorted(shares.values())
    threshold = (ranked[2] + ranked[3]) / 2
    policy = SimLayerKV(lazy_threshold=threshold, sink_size=SINKS, recent_size=RECENT, last_size=last, when=when)

    def rule(now: Now) -> list[int]:
        if shares[now.layer, now.row] <= threshold or (now.decoding and when == "prefill"):
            return now.held
        return now.held[:SINKS] + now.held[SINKS:][-(RECENT - last) :]

    check(policy, rule)


def test_short_prompts_are_left_alone() -> None:
    model = tiny("llama")
    policy = SimLayerKV(lazy_threshold=0.0, sink_size=SINKS, recent_size=RECENT)

    def lengths(tokens: Tensor) -> Any:
        cache = policy.make_cache(model)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
        return cache.lengths()

    assert lengths(prompt(1, SINKS + RECENT + 1)) == [[9, 9]] * 3
    assert lengths(prompt(1, SINKS + RECENT + 2)) == [[7, 7]] * 3
    release(model)


def test_rows_are_judged_apart_and_keep_their_judgement() -> None:
    """Rows that change places take it along; a row too short to be judged keeps all."""
    model = tiny("llama").double()
    tokens, padding = prompt(2, 20), torch.ones(2, 21, dtype=torch.long)
    padding[1, :12] = 0
    policy = SimLayerKV(lazy_threshold=0.0, sink_size=SINKS, recent_size=RECENT, when="both")
    cache = policy.make_cache(model)
    with torch.no_grad():
        model(tokens, attention_mask=padding[:, :-1], past_key_values=cache)
        assert all(layer.memo["lazy"].tolist() == [True, False] for layer in cache.layers)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert all(layer.memo["lazy"].tolist() == [False, True] for layer in cache.layers)
        cache.reset()
        assert not cache.layers[0].memo
    release(model)


@pytest.mark.parametrize(("given", "match"), [
    ({"lazy_threshold": 1.5}, "lazy_threshold is a share of attention"),
    ({"recent_size": 0}, "recent_size must be a whole number of at least 1"),
    ({"recent_size": 2, "sink_size": 1, "last_size": 3}, "last_size=3 queries look at"),
    ({"budget_tokens": 8}, "lazy_threshold says what is dropped; leave budget_tokens out"),
    ({"allocation": AdaKV()}, "leave allocation out"),
    ({"when": "decode"}, "when='decode' is not possible"),
])  # fmt: skip
def test_what_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SimLayerKV(**given)
