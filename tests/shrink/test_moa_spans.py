"""MoA's spans as loops, and its plans against every plan there is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from recorder import feed, feed_dense, recording
from test_full import MODES, generate, repeating, same, turns
from test_merging import divergence, passkeys
from tiny_families import prompt, tiny
from transformers import DynamicCache

from manyheads.hosts.loading import load_model
from manyheads.shrink import AdaKV, MoA, plan_spans, release

ENDS = [14, 15, 16, 17, 20, 21, 22]
LEFT = [0, 4]
RULES = [[(3, 0), (1, 0.25)], [(0, 0.5), (0, 1)], [(-6, 0.75), (2.5, 0.1)]]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    padding = torch.ones(2, ENDS[-1], dtype=torch.long)
    padding[1, : LEFT[1]] = 0
    return prompt(2, ENDS[-1]), padding


@pytest.mark.parametrize("policy", [
    MoA(rules=RULES, sink_size=2), MoA(rule=(1, 0.2), sink_size=0), MoA(rules=RULES, sink_size=2, interval=3),
], ids=["table", "one", "interval"])  # fmt: skip
def test_spans(policy: MoA) -> None:
    tokens, padding = padded()
    model = tiny("llama")
    with recording() as steps:
        given = feed(model, policy.make_cache(model), tokens, padding, ENDS)
    dropped = 0
    for layer, own in steps.items():
        held: dict[tuple[int, int], list[int]] = {place: [] for place in own[0].after}
        total = 0
        for step in own:
            count = step.keys.shape[2]
            new = range(total, total + count)
            total += count
            spans = {}
            for row, head in held:
                alpha, beta = policy.rules[layer][head] if policy.rules else policy.rule
                held[row, head] += [slot for slot in new if slot >= LEFT[row]]
                spans[row, head] = max(1, math.floor(alpha + beta * (total - LEFT[row])))
            # All heads are cut when one is an interval over its span; a head is as long as its longest row.
            longest = [max(len(held[row, head]) for row in range(2)) for head in range(2)]
            least = policy.interval if count == 1 else 1
            if any(longest[place[1]] >= spans[place] + policy.sink_size + least for place in held):
                for place, slots in held.items():
                    first = LEFT[place[0]] + policy.sink_size
                    while len([slot for slot in slots if slot >= first]) > spans[place]:
                        slots.remove(min(slot for slot in slots if slot >= first))
                        dropped += 1
            for (row, head), slots in held.items():
                assert [slot for slot in step.after[row, head] if slot >= LEFT[row]] == slots, (layer, row, head, total)
    assert dropped > 40
    wanted = feed_dense(tiny("llama"), steps, tokens, padding, ENDS)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_spans_that_cover_everything(family: str) -> None:
    model = tiny(family)
    tokens, padding = prompt(2, 24), torch.ones(2, 24, dtype=torch.long)
    padding[1, :6] = 0
    wanted = turns(model, tokens, padding, DynamicCache(config=model.config))
    one = repeating(1, 12)
    texts = {mode: generate(model, one, **MODES[mode]) for mode in ("beams", "lookup")}
    for policy in (MoA(rule=(0, 1)), MoA(rule=(30, 0)), MoA(rule=(1, 0), sink_size=40)):
        given = turns(model, tokens, padding, policy.make_cache(model))
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
        release(model)
        for mode, text in texts.items():
            same(generate(model, one, past_key_values=policy.make_cache(model), **MODES[mode]), text)
            release(model)


def test_rows_that_change_places() -> None:
    model, tokens, more = tiny("llama").double(), prompt(2, 16), prompt(1, 3, seed=5)
    policy = MoA(rules=RULES, sink_size=1)

    def go_on(cache: Any, rows: int) -> torch.Tensor:
        return torch.stack([model(more[:, i : i + 1].expand(rows, -1), past_key_values=cache).logits for i in range(3)])

    with torch.no_grad():
        cache = policy.make_cache(model)
        model(tokens, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        given = go_on(cache, 2)
        cache = policy.make_cache(model)
        model(tokens[1:], past_key_values=cache)
        wanted = go_on(cache, 1)
    torch.testing.assert_close(given, wanted.expand_as(given))


def held_share(rule: tuple[float, float], length: int, sinks: int) -> float:
    return min(length, sinks + max(1, math.floor(rule[0] + rule[1] * length + 1e-9))) / length


@pytest.mark.parametrize("distinct", [None, 1, 2])
@pytest.mark.parametrize("density", [0.5, [0.7, 0.35]])
def test_a_plan_is_the_best_of_all(density: Any, distinct: int | None) -> None:
    configs, lengths, sinks = [(4.0, 0.0), (0.0, 0.3), (2.0, 0.6), (0.0, 1.0)], [20, 60], 2
    losses = torch.rand(2, 2, 4, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 1e-9
    # Long spans cost less, at a rate of each head's own.
    losses = losses + torch.rand(2, 2, 1, 1, dtype=torch.float64) * 1e-8 * torch.tensor([3.0, 2.0, 1.0, 0.0])[:, None]
    weights, limits = [1.0, 2.5], density if isinstance(density, list) else [density] * 2
    least, best = math.inf, None
    for plan in itertools.product(range(4), repeat=4):
        fits = all(
            sum(held_share(configs[c], n, sinks) for c in plan) / 4 <= limit
            for n, limit in zip(lengths, limits, strict=True)
        )
        if distinct is not None and max(len(set(plan[:2])), len(set(plan[2:]))) > distinct:
            continue
        cost = sum(weights[j] * float(losses[i // 2, i % 2, c, j]) for i, c in enumerate(plan) for j in range(2))
        if fits and cost < least:
            least, best = cost, plan
    assert best is not None
    found = plan_spans(losses.tolist(), configs, lengths, density, sink_size=sinks, distinct=distinct, weights=weights)
    assert found == [[configs[best[0]], configs[best[1]]], [configs[best[2]], configs[best[3]]]]
    MoA(rules=found, sink_size=sinks)


def test_query_heads_of_a_kv_head_are_added_up() -> None:
    losses = torch.zeros(1, 4, 2, 1)
    losses[0, :, 0, 0] = torch.tensor([0.0, 5.0, 3.0, 3.0])
    assert plan_spans(losses, [(1, 0), (0, 1)], [100], 0.51, sink_size=0, kv_heads=2) == [[(1, 0), (0, 1)]]


def test_a_plan_on_the_packaged_model() -> None:
    """One head at a time is cut to find what that costs; the plan then beats equal spans of the same density."""
    model, ids = load_model().model, passkeys(2, 300)
    config, prefix, sinks = model.config, 260, 4
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    configs: list[tuple[float, float]] = [(12, 0), (0, 1)]

    def cut(layer: int, head: int) -> list[list[tuple[float, float]]]:
        return [[configs[int((i, j) != (layer, head))] for j in range(heads)] for i in range(layers)]

    losses = [
        [[[divergence(model, MoA(rules=cut(i, j), sink_size=sinks), ids, prefix)], [0.0]] for j in range(heads)]
        for i in range(layers)
    ]
    rules = plan_spans(losses, configs, [prefix], 0.4, sink_size=sinks)
    planned = divergence(model, MoA(rules=rules, sink_size=sinks), ids, prefix)
    held = sum(held_share(rule, prefix, sinks) for row in rules for rule in row) / layers / heads
    assert 0.3 < held <= 0.4
    equal = divergence(model, MoA(rule=(0, 0.4), sink_size=0), ids, prefix)
    assert planned < equal / 2


def test_what_is_refused() -> None:
    for match, given in {
        "one rule for all": {},
        "rules, a table": {"rules": RULES, "rule": (1, 0)},
        "sink_size": {"rule": (1, 0), "sink_size": -1},
        "rules are the budget; leave compression_ratio": {"rule": (1, 0), "compression_ratio": 0.5},
        "leave allocation": {"rule": (1, 0), "allocation": AdaKV()},
        "leave budget_tokens": {"rule": (1, 0), "budget_tokens": 100},
        "rows of one length": {"rules": [[(1, 0)], [(1, 0), (2, 0)]]},
        "pair of numbers": {"rule": (1, 0, 2)},
        "must be positive": {"rule": (-5, 0)},
        "no faster": {"rule": (5, 1.5)},
        "beta from 0": {"rule": (5, -0.1)},
        "is no number": {"rule": (math.nan, 0)},
    }.items():
        with pytest.raises(ValueError, match=match):
            MoA(**given)
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"for \(2, 2\).*has \(3, 2\)"):
        model(prompt(1, 9), past_key_values=MoA(rules=RULES[:2]).make_cache(model))
    good = torch.rand(1, 2, 2, 1)
    plan = {"losses": good, "configs": [(1, 0), (0, 1)], "lengths": [100], "density": 0.5, "sink_size": 0}
    for match, change in {
        "2 configs, 3 lengths": {"lengths": [1, 2, 3]},
        "not finite": {"losses": good * math.nan},
        "among 3 KV heads": {"kv_heads": 3},
        "shortest spans hold 0.01 at 100": {"density": 0.001},
        "share above 0": {"density": 1.5},
        "one for each length": {"density": [0.1, 0.2]},
        "weights are": {"weights": [-1.0]},
        "number of rules": {"distinct": 0},
        "must be positive": {"configs": [(0, 0), (0, 1)]},
        "at least 1; got": {"lengths": [0]},
    }.items():
        with pytest.raises(ValueError, match=match):
            plan_spans(**{**plan, **change})
