"""Expected attention from its definition, in loops and float64, against what a cache keeps after every pass."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from recorder import feed, feed_dense, held, recording
from test_full import MODES, generate, repeating, same, turns
from test_merging import divergence, passkeys
from tiny_families import prompt, tiny
from torch import Tensor
from transformers import DynamicCache

from manyheads.hosts.loading import load_model
from manyheads.shrink import AdaKV, ExpectedAttention, KeyNorm, release
from manyheads.shrink.layer import RaggedLayer

ENDS = [14, 15, 16, 19, 20, 21, 22]
LEFT = [0, 4]
AHEAD = 6


def padded() -> tuple[Tensor, Tensor]:
    padding = torch.ones(2, ENDS[-1], dtype=torch.long)
    padding[1, : LEFT[1]] = 0
    return torch.stack([torch.randperm(50)[: ENDS[-1]] + 3 for _ in range(2)]), padding


@functools.cache
def rotation(position: float, size: int, turning: int) -> Tensor:
    """The matrix that turns a row of `size` features, of which the first `turning` go in halves, base 10000."""
    matrix, half = torch.eye(size, dtype=torch.float64), turning // 2
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / turning)
        matrix[i, i] = matrix[i + half, i + half] = math.cos(angle)
        matrix[i, i + half], matrix[i + half, i] = -math.sin(angle), math.sin(angle)
    return matrix


def expected(
    asked: list[list[Tensor]], keys: dict[int, Tensor], values: dict[int, Tensor], count: int, scale: float, **own: Any
) -> dict[int, float]:
    """Scores by slot. asked: for each query head its queries before rotation; count: tokens so far."""
    size = len(next(iter(keys.values())))
    turns = [rotation(count + t, size, own["turning"]) for t in range(AHEAD)]
    ahead = sum(turns) / AHEAD
    score = dict.fromkeys(keys, 0.0)
    for queries in asked:
        mean = sum(queries) / len(queries)
        spread = sum(torch.outer(query - mean, query - mean) for query in queries) / len(queries)
        mean, spread = ahead @ mean, ahead @ spread @ ahead.T
        weight = {}
        for slot, key in keys.items():
            exponent = float(mean @ key) * scale
            if own["covariance"]:
                exponent += 0.5 * scale**2 * float(key @ spread @ key)
            weight[slot] = math.exp(exponent)
        total = sum(weight.values())
        for slot in keys:
            score[slot] += weight[slot] / total / len(asked)
    if own["norms"]:
        score = {slot: (own + 0.01) * float(values[slot].norm()) for slot, own in score.items()}
    return score


@pytest.mark.parametrize(("family", "turning", "settings"), [
    ("llama", 8, {}),
    ("llama", 8, {"use_covariance": False}),
    ("llama", 8, {"use_vnorm": False}),
    ("gpt_neox", 2, {}),
    ("gpt2", 0, {"rotary": False}),
], ids=["llama", "mean", "attention", "part", "none"])  # fmt: skip
def test_keeps_what_is_expected(family: str, turning: int, settings: dict[str, Any]) -> None:
    """Prompt, single tokens and a chunk of a padded batch: the statistics grow with every query."""
    model = tiny(family).double()
    tokens, padding = padded()
    policy = ExpectedAttention(
        interval=1, budget_tokens=8, sink_size=2, n_future_positions=AHEAD, epsilon=0.01, **settings
    )
    values: dict[int, list[Tensor]] = {}
    update = RaggedLayer.update
    with pytest.MonkeyPatch.context() as patch:

        def watched(self: RaggedLayer, keys: Tensor, new: Tensor, *args: Any, **kwargs: Any) -> Any:
            values.setdefault(self.index, []).append(new.clone())
            return update(self, keys, new, *args, **kwargs)

        patch.setattr(RaggedLayer, "update", watched)
        with recording() as steps:
            given = feed(model, policy.make_cache(model), tokens, padding, ENDS)
    for layer, own in steps.items():
        repeat = own[0].queries.shape[1] // own[0].keys.shape[1]
        every = torch.cat([step.queries for step in own], 2)
        keys, vectors = torch.cat([step.keys for step in own], 2), torch.cat(values[layer], 2)
        size = keys.shape[-1]
        for row, head in own[0].after:
            kept: list[int] = []
            total = 0
            for step in own:
                new = range(max(total, LEFT[row]), total + step.keys.shape[2])
                kept, total = kept + list(new), total + step.keys.shape[2]
                first = LEFT[row] + 2
                asked = [
                    [
                        rotation(-(slot - LEFT[row]), size, turning) @ every[row, repeat * head + r, slot]
                        for slot in range(first, total)
                    ]
                    for r in range(repeat)
                ]
                rest = [slot for slot in kept if slot >= first]
                score = expected(
                    asked,
                    {slot: keys[row, head, slot] for slot in rest},
                    {slot: vectors[row, head, slot] for slot in rest},
                    total - LEFT[row],
                    step.scale,
                    turning=turning,
                    covariance=policy.use_covariance,
                    norms=policy.use_vnorm,
                )
                if len(kept) > 8:
                    best = sorted(rest, key=lambda slot, score=score: -score[slot])[: 8 - 2]
                    kept = sorted([slot for slot in kept if slot < first] + best)
                assert [slot for slot in step.after[row, head] if slot >= LEFT[row]] == kept, (layer, row, head, total)
    release(model)
    wanted = feed_dense(tiny(family).double(), steps, tokens, padding, ENDS)
    torch.testing.assert_close(given, wanted, atol=1e-6, rtol=1e-6)


def test_the_expectation_is_that_of_many_queries() -> None:
    """exp(m k + k S k / 2) is the mean of exp(q k) over Gaussian queries q."""
    generator = torch.Generator().manual_seed(1)
    size, scale = 4, 0.5
    root = torch.randn(size, size, generator=generator, dtype=torch.float64) / 2
    queries = torch.randn(40000, size, generator=generator, dtype=torch.float64) @ root.T + 0.3
    keys = torch.randn(5, size, generator=generator, dtype=torch.float64)
    sampled = (queries @ keys.T * scale).exp().mean(0)
    mean, spread = queries.mean(0), torch.cov(queries.T)
    formula = torch.stack([(key @ mean * scale + 0.5 * scale**2 * (key @ spread @ key)).exp() for key in keys])
    torch.testing.assert_close(formula, sampled, atol=0, rtol=0.03)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "smollm3"])
def test_a_budget_that_covers_everything(family: str) -> None:
    model = tiny(family)
    tokens, padding = prompt(2, 24), torch.ones(2, 24, dtype=torch.long)
    padding[1, :6] = 0
    wanted = turns(model, tokens, padding, DynamicCache(config=model.config))
    policy = ExpectedAttention(budget_tokens=64)
    torch.testing.assert_close(turns(model, tokens, padding, policy.make_cache(model)), wanted, atol=1e-5, rtol=1e-5)
    release(model)
    for mode in ("beams", "lookup"):
        one = repeating(1, 12)
        text = generate(model, one, **MODES[mode])
        same(generate(model, one, past_key_values=policy.make_cache(model), **MODES[mode]), text)
        release(model)


def test_rows_that_change_places_take_their_statistics_along() -> None:
    model, tokens, more = tiny("llama").double(), prompt(2, 16), prompt(1, 4, seed=5)
    policy = ExpectedAttention(interval=1, budget_tokens=6, sink_size=1, n_future_positions=AHEAD)

    def go_on(cache: Any, rows: int) -> Tensor:
        return torch.stack([model(more[:, i : i + 1].expand(rows, -1), past_key_values=cache).logits for i in range(4)])

    with torch.no_grad():
        cache = policy.make_cache(model)
        model(tokens, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        given = go_on(cache, 2)
        alone = policy.make_cache(model)
        model(tokens[1:], past_key_values=alone)
        wanted = go_on(alone, 1)
    torch.testing.assert_close(given, wanted.expand_as(given))
    for two, one in zip(cache.layers, alone.layers, strict=True):
        assert held(two)[0, 0] == held(two)[1, 0] == held(one)[0, 0]


def test_with_shares_of_ada_kv() -> None:
    model = tiny("llama")
    cache = ExpectedAttention(interval=1, budget_tokens=8, sink_size=2, allocation=AdaKV(floor=0.2)).make_cache(model)
    feed(model, cache, prompt(1, 40), torch.ones(1, 40, dtype=torch.long), [36, 37, 38, 39, 40])
    assert all(sum(own) <= 16 for own in cache.lengths())
    assert len({length for own in cache.lengths() for length in own}) > 1
    for layer in cache.layers:
        assert all(slots[:2] == [0, 1] for slots in held(layer).values())


def test_on_the_packaged_model() -> None:
    """A third of the cache goes with less harm than by key norms."""
    model, ids = load_model().model, passkeys(3, 400)
    ours = divergence(model, ExpectedAttention(compression_ratio=0.3), ids, 320)
    norms = divergence(model, KeyNorm(compression_ratio=0.3), ids, 320)
    assert ours < 0.7 * norms


def test_what_is_refused() -> None:
    for match, given in {
        "n_future_positions": {"n_future_positions": 0},
        "sink_size": {"sink_size": -1},
        "epsilon": {"epsilon": -0.1},
        "below the 5": {"budget_tokens": 4},
    }.items():
        with pytest.raises(ValueError, match=match):
            ExpectedAttention(**given)
    model = tiny("gpt2")
    with pytest.raises(ValueError, match=r"cannot turn queries back.*no rotary positions.*rotary=False"):
        ExpectedAttention(budget_tokens=8).make_cache(model)


@pytest.mark.parametrize("rows", [1, 2])
def test_queries_counted_in_bunches_are_those_counted_one_by_one(rows: int) -> None:
    model, tokens = tiny("llama"), prompt(rows, 45)
    padding = torch.ones(rows, 45, dtype=torch.long)
    padding[-1, : 4 * (rows - 1)] = 0
    one, bunches = (ExpectedAttention(budget_tokens=64, interval=own).make_cache(model) for own in (1, 5))
    # Twelve tokens one by one leave two that wait when the second turn comes.
    for cache in (one, bunches):
        feed(model, cache, tokens, padding, [20, *range(21, 33), 40])
    for layer, other in zip(one.layers, bunches.layers, strict=True):
        assert layer.memo.keys() == other.memo.keys()
        torch.testing.assert_close(other.memo, layer.memo, rtol=1e-4, atol=1e-4)


def test_a_budget_is_exceeded_by_less_than_the_interval() -> None:
    model, tokens = tiny("llama"), prompt(2, 70)
    cache = ExpectedAttention(budget_tokens=8, sink_size=2).make_cache(model)
    with torch.no_grad():
        model(tokens[:, :30], past_key_values=cache)
        lengths = []
        for token in tokens[:, 30:].split(1, 1):
            model(token, past_key_values=cache)
            lengths.append(cache.lengths()[0][0])
    assert min(lengths) == 8
    assert max(lengths) == 8 + 15
