"""Every policy's own rule, as loops over slots in float64, against what its cache holds after every pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import Step, feed, recording
from tiny_families import prompt, tiny
from torch import Tensor

from manyheads.shrink import H2O, TOVA, AdaKV, Duo, KeyNorm, Policy, PyramidKV, SnapKV, StreamingLLM, release

ENDS = [14, 15, 16, 17, 20, 21, 22]
LEFT = [0, 4]
# A head of one row: its keys by slot, the queries of every pass [r, n, d] by their slots, and the scale.
Rule = Callable[["Head", list[int], int], list[int]]


class Head:
    """One KV head of one row, simulated: what it holds, and what was asked of it."""

    def __init__(self, steps: list[Step], row: int, head: int, first_real: int) -> None:
        self.keys = torch.cat([step.keys[row, head] for step in steps], 0)
        self.scale = steps[0].scale
        repeat = steps[0].queries.shape[1] // steps[0].keys.shape[1]
        self.queries = [step.queries[row, head * repeat : (head + 1) * repeat] for step in steps]
        self.first_real = first_real
        self.held: list[int] = []
        self.mass: dict[int, float] = {}
        self.seen = 0

    def real(self) -> int:
        return self.seen - self.first_real

    def look(self, query: Tensor, own: int) -> dict[int, float]:
        """Attention of one query at slot `own` over what is held."""
        visible = [slot for slot in self.held if slot <= own]
        scores = {slot: float(query @ self.keys[slot]) * self.scale for slot in visible}
        top = max(scores.values())
        total = sum(math.exp(value - top) for value in scores.values())
        return {slot: math.exp(scores[slot] - top) / total for slot in visible}


def simulate(steps: list[Step], row: int, head: int, rule: Rule, before: Rule | None = None) -> list[list[int]]:
    """What one head holds after every pass."""
    own, history = Head(steps, row, head, LEFT[row]), []
    for turn, queries in enumerate(own.queries):
        count = queries.shape[1]
        if before is not None and turn:
            own.held = before(own, own.held, count)
        new = [slot for slot in range(own.seen, own.seen + count) if slot >= own.first_real]
        own.held = own.held + new
        own.seen += count
        for place in range(count):
            slot = own.seen - count + place
            if slot < own.first_real:
                continue
            for repeat in range(queries.shape[0]):
                for key, weight in own.look(queries[repeat, place], slot).items():
                    own.mass[key] = own.mass.get(key, 0.0) + weight
        own.held = sorted(rule(own, own.held, turn))
        history.append(own.held)
    return history


def best(score: dict[int, float], count: int) -> list[int]:
    return sorted(score, key=lambda slot: -score[slot])[:count]


def check(policy: Policy, rule_of: Callable[[int, int], Rule], before: Rule | None = None) -> None:
    model = tiny("llama")
    # No token twice: equal keys would tie.
    tokens = torch.stack([torch.randperm(50)[: ENDS[-1]] + 3 for _ in range(2)])
    padding = torch.ones(2, ENDS[-1], dtype=torch.long)
    padding[1, : LEFT[1]] = 0
    with recording() as steps:
        feed(model, policy.make_cache(model), tokens, padding, ENDS)
    dropped = False
    for layer, own in steps.items():
        for row, head in own[0].after:
            wanted = simulate(own, row, head, rule_of(layer, head), before)
            given = [[slot for slot in step.after[row, head] if slot >= LEFT[row]] for step in own]
            assert given == wanted, (layer, row, head)
            dropped = dropped or len(given[-1]) < ENDS[-1] - LEFT[row]
    assert dropped


def latest(head: Head, held: list[int], count: int, sinks: int) -> list[int]:
    """The first `sinks` real tokens and the latest of those held, `count` in all."""
    first = [slot for slot in held if slot < head.first_real + sinks]
    rest = [slot for slot in held if slot >= head.first_real + sinks]
    return first + rest[len(rest) - max(0, count - len(first)) :] if len(held) > count else held


def test_streaming() -> None:
    def after(head: Head, held: list[int], turn: int) -> list[int]:
        return latest(head, held, 7, 2)

    def before(head: Head, held: list[int], coming: int) -> list[int]:
        return latest(head, held, max(2, 7 - coming), 2)

    check(StreamingLLM(budget_tokens=7, sink_size=2), lambda layer, head: after, before)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "gemma3_text", "phi3", "gpt_oss"])
def test_streaming_positions_are_those_in_the_cache(family: str) -> None:
    """In one layer keys know nothing of other tokens: what is dropped might as well never have been written."""
    kind = {"layer_types": ["full_attention"]} if family in ("gemma3_text", "gpt_oss") else {}
    model = tiny(family, num_hidden_layers=1, **kind)
    tokens, padding = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    padding[1, :5] = 0
    ends = [20, *range(21, 31), 34, *range(35, 41)]
    given = feed(model, StreamingLLM(budget_tokens=9, sink_size=3).make_cache(model), tokens, padding, ends)
    release(model)
    at, start = 0, 0
    for end in ends:
        for row in range(2):
            at += int(padding[row, start:end].sum())
            first, coming = LEFTMOST[row], end - start
            latest = list(range(first, end)) if not start else list(range(end - max(coming, 9 - 3), end))
            kept = latest if not start else [*range(first, first + 3), *latest]
            wanted = model(tokens[row : row + 1, kept], use_cache=False).logits[0, -1]
            torch.testing.assert_close(given[at - 1], wanted, atol=2e-5, rtol=2e-5)
        start = end


LEFTMOST = [0, 5]


def test_key_norm() -> None:
    def rule(head: Head, held: list[int], turn: int) -> list[int]:
        norms = {slot: -math.sqrt(sum(float(x) ** 2 for x in head.keys[slot])) for slot in held}
        return best(norms, math.floor(head.real() * 0.4 + 1e-9))

    check(KeyNorm(compression_ratio=0.6), lambda layer, head: rule)


def last_look(head: Head, held: list[int], turn: int) -> dict[int, float]:
    queries, score = head.queries[turn], dict.fromkeys(held, 0.0)
    for repeat in range(queries.shape[0]):
        for slot, weight in head.look(queries[repeat, -1], head.seen - 1).items():
            score[slot] += weight
    return score


def test_tova() -> None:
    check(TOVA(budget_tokens=6), lambda layer, head: lambda own, held, turn: best(last_look(own, held, turn), 6))


def test_tova_waits_for_its_interval() -> None:
    def rule(head: Head, held: list[int], turn: int) -> list[int]:
        decoding = head.queries[turn].shape[1] == 1
        # The longest row of the batch decides when; all of this prompt's rows are over the budget from the start.
        due = len(held) >= 6 + 3 if decoding else len(held) > 6
        return best(last_look(head, held, turn), 6) if due else held

    check(TOVA(budget_tokens=6, interval=3), lambda layer, head: rule)


def test_tova_shared_by_all_heads() -> None:
    model = tiny("llama")
    cache = TOVA(budget_tokens=6, shared=True).make_cache(model)
    with recording() as steps:
        feed(model, cache, prompt(1, 14), torch.ones(1, 14, dtype=torch.long), [13, 14])
    for own in steps.values():
        assert own[-1].after[0, 0] == own[-1].after[0, 1]
        assert len(own[-1].after[0, 0]) == 6


def test_h2o() -> None:
    def rule(head: Head, held: list[int], turn: int) -> list[int]:
        return best({slot: 1e9 if slot >= head.seen - 3 else head.mass[slot] for slot in held}, 6)

    check(H2O(budget_tokens=6), lambda layer, head: rule)
    check(H2O(budget_tokens=6, recent_size=3), lambda layer, head: rule)


def snap(head: Head, held: list[int], turn: int, window: int, kernel: int) -> dict[int, float]:
    queries = head.queries[turn]
    count = queries.shape[1]
    asked = [place for place in range(max(0, count - window), count) if head.seen - count + place >= head.first_real]
    outside = [slot for slot in held if slot < head.seen - window]
    votes = dict.fromkeys(held, 0.0)
    for place in asked:
        for repeat in range(queries.shape[0]):
            for slot, weight in head.look(queries[repeat, place], head.seen - count + place).items():
                if slot in outside:
                    votes[slot] += weight / len(asked) / queries.shape[0]
    score = {}
    for place, slot in enumerate(held):
        near = [held[i] for i in range(max(0, place - kernel // 2), min(len(held), place + kernel // 2 + 1))]
        score[slot] = sum(votes[other] for other in near) / kernel if slot in outside else math.inf
    return score


def test_snapkv() -> None:
    def rule(head: Head, held: list[int], turn: int) -> list[int]:
        if head.queries[turn].shape[1] == 1 or len(held) <= 8:
            return held
        return best(snap(head, held, turn, 3, 5), 8)

    check(SnapKV(when="passes", budget_tokens=8, window_size=3, kernel_size=5), lambda layer, head: rule)


def test_pyramid_kv() -> None:
    def rule_of(layer: int, head: int) -> Rule:
        def rule(own: Head, held: list[int], turn: int) -> list[int]:
            low, high = 6 / 4, 2 * 6 - 6 / 4
            if high > own.real():
                high, low = own.real(), 2 * 6 - own.real()
            budget = math.floor(high - (high - low) * layer / 2)
            norms = {slot: -float(own.keys[slot].norm()) for slot in held}
            return best(norms, budget) if own.queries[turn].shape[1] > 1 else held

        return rule

    check(KeyNorm(budget_tokens=6, when="passes", allocation=PyramidKV(beta=4)), rule_of)


def test_ada_kv() -> None:
    scores = torch.rand(2, 3, 11, dtype=torch.float64)
    scores[1, :, :6] = -math.inf
    counts = []
    for row in range(2):
        given = AdaKV(floor=0.5).of_heads(scores[row : row + 1], torch.full((1, 3), 4))
        sure = [sorted(range(11), key=lambda i, h=head: -scores[row, h, i])[:2] for head in range(3)]
        rest = [(float(scores[row, h, i]), h) for h in range(3) for i in range(11) if i not in sure[h]]
        rest = [own for own in sorted(rest, reverse=True)[: 3 * 4 - 6] if own[0] > -math.inf]
        counts.append([2 + sum(h == head for _, h in rest) for head in range(3)])
        assert given.tolist() == [counts[row]]
    shared = AdaKV(floor=0.5).of_heads(scores, torch.full((1, 3), 4))
    assert shared.tolist() == [[(one + two) // 2 for one, two in zip(*counts, strict=True)]]
    assert AdaKV(floor=1.0).of_heads(scores[:1], torch.full((1, 3), 4)).tolist() == [[4, 4, 4]]


def test_duo(tmp_path: Any) -> None:
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("0.9\t0.1\n0.2\t0.8\n0.3\t0.4\n")
    gates = Duo.read_gates(path)
    assert gates == [[0.9, 0.1], [0.2, 0.8], [0.3, 0.4]]
    policy = Duo(gates=gates, sink_size=2, recent_size=3, compression_ratio=0.5)
    assert policy.full.tolist() == [[True, False], [False, True], [False, True]]

    def before_and_after(count: int) -> Rule:
        return lambda head, held, turn: latest(head, held, count, 2)

    def rule_of(layer: int, head: int) -> Rule:
        return before_and_after(10**6 if policy.full[layer][head] else 5)

    # Streaming heads make room first, which shows in what they hold after a chunk only through its own eviction.
    check(policy, rule_of)


def test_budget_shared_by_duos_full_heads() -> None:
    gates = [[0.9, 0.1], [0.2, 0.8], [0.3, 0.4]]
    model = tiny("llama")
    cache = Duo(gates=gates, sink_size=2, recent_size=2, budget_tokens=7).make_cache(model)
    feed(model, cache, prompt(1, 20), torch.ones(1, 20, dtype=torch.long), [20])
    assert cache.lengths() == [[10, 4], [4, 10], [4, 10]]


@pytest.mark.parametrize("beta", [4.0, 20.0])
def test_pyramid_keeps_the_mean(beta: float) -> None:
    mean, count = torch.tensor([40.0]), torch.tensor([1000])
    budgets = [float(PyramidKV(beta=beta).of_layer(mean, layer, 8, count)) for layer in range(8)]
    assert budgets == sorted(budgets, reverse=True)
    assert 40 - 1 < sum(budgets) / 8 <= 40
