"""Finch: the question's attention in loops; and what is kept moves up to the question."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loops import ENDS, LEFT, Now, batch, best, check, watched
from recorder import held
from test_expected import rotation
from tiny_families import prompt, tiny

from manyheads.shrink import Finch, release


def asked(now: Now, size: int, normalize: bool) -> dict[int, float]:
    repeat, n = now.queries.shape[:2]
    votes = dict.fromkeys(now.held, 0.0)
    for place in range(n - size, n):
        own = now.since + place
        before = sum(slot < own for slot in now.held)
        for query in now.queries[:, place]:
            for slot, weight in now.look(query, own).items():
                votes[slot] += weight * (before if normalize else 1) / size / repeat
    return {slot: math.inf if slot >= now.seen - size else vote for slot, vote in votes.items()}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sizes", [3, [2, 4]], ids=["one", "each"])
def test_the_questions_attention(sizes: Any, normalize: bool) -> None:
    def rule(now: Now) -> list[int]:
        if now.decoding or len(now.held) <= 11:
            return now.held
        size = sizes if isinstance(sizes, int) else sizes[now.row]
        return best(asked(now, size, normalize), 11)

    check(Finch(window_size=sizes, budget_tokens=11, normalize=normalize, positions="text"), rule)


def test_by_chunks() -> None:
    """Every chunk keeps its share, and what is left over goes to the best of the rest."""
    budget, length, size = 14, 7, 2

    def rule(now: Now) -> list[int]:
        if now.decoding or len(now.held) <= budget:
            return now.held
        score = asked(now, size, True)
        kept = [slot for slot in now.held if score[slot] == math.inf]
        for start in range(0, len(now.held), length):
            own = now.held[start : start + length]
            kept += best({slot: score[slot] for slot in own}, len(own) * budget // len(now.held))
        kept = list(dict.fromkeys(kept))
        rest = {slot: score[slot] for slot in now.held if slot not in kept}
        return kept + best(rest, budget - len(kept))

    check(Finch(window_size=size, budget_tokens=budget, chunk_length=length, positions="text"), rule)


@pytest.mark.parametrize(("family", "turning"), [("llama", 8), ("gpt_neox", 2), ("phi3", 8)])
def test_what_is_kept_moves_up(family: str, turning: int) -> None:
    """Keys as they came, turned on to stand side by side before the next token; a second turn leaves them."""
    model = tiny(family).double()
    tokens, padding = batch()
    policy = Finch(window_size=2, budget_tokens=9)
    cache: list[Any] = []

    class Kept(Finch):
        def make_cache(self, model: Any) -> Any:
            cache.append(super().make_cache(model))
            return cache[0]

    kept = Kept(**policy.to_dict())
    steps, _, _ = watched(model, kept, tokens, padding, ENDS)
    last = ENDS[0]  # the context's end, where it was cut
    for layer, own in enumerate(cache[0].layers):
        came = torch.cat([step.keys for step in steps[layer]], 2)
        dim = came.shape[-1]
        for group in own.store.groups:
            slots, keys = group.slots(), group.view("keys")
            for row, first in enumerate(LEFT):
                for i, head in enumerate(group.heads):
                    order = sorted(slot for slot in slots[row, i].tolist() if slot >= first)
                    cut = [slot for slot in order if slot < last]
                    for place, slot in enumerate(slots[row, i].tolist()):
                        if slot < first:
                            continue
                        # Of the tokens that stood at the last cut, each directly before the next; later ones unmoved.
                        moved = last - len(cut) + cut.index(slot) - slot if slot in cut else 0
                        wanted = rotation(moved, dim, turning) @ came[row, head, slot]
                        torch.testing.assert_close(keys[row, i, place], wanted)
                    assert len(order) <= 9 + ENDS[-1] - last
    release(model)


def test_nothing_moves_behind_a_window() -> None:
    """Layers with a sliding window keep their keys where they are."""
    model = tiny("mistral")
    cache = Finch(window_size=2, budget_tokens=5).make_cache(model)
    with torch.no_grad():
        model(prompt(2, 20), past_key_values=cache)
    assert all(layer.angles is None for layer in cache.layers)
    assert cache.lengths() == [[5, 5]] * 3
    assert all(slots[-2:] == [18, 19] for layer in cache.layers for slots in held(layer).values())


@pytest.mark.parametrize(("given", "match"), [
    ({"window_size": 0}, "window_size must be a whole number of at least 1; got 0"),
    ({"window_size": [3, 0]}, "window_size must be a whole number of at least 1; got 0"),
    ({"window_size": []}, "one for each row"),
    ({"window_size": 3, "chunk_length": 0}, "chunk_length"),
    ({"window_size": 3, "positions": "none"}, "positions is 'cache' or 'text'"),
    ({"window_size": 3, "when": "both"}, "when='both' is not possible"),
    ({"window_size": [3, 5], "budget_tokens": 5}, "below the 6"),
])  # fmt: skip
def test_what_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Finch(**given)


def test_what_a_model_or_a_batch_refuses() -> None:
    with pytest.raises(ValueError, match=r"no rotary positions.*positions='text'"):
        Finch(window_size=2, budget_tokens=8).make_cache(tiny("gpt2"))
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"window_size has 3 numbers and the batch 2 rows"):
        model(prompt(2, 20), past_key_values=Finch(window_size=[2, 3, 4], budget_tokens=8).make_cache(model))
