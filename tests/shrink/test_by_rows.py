"""Policies that look at keys and values alone: KeyDiff, LagKV, CUR."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loops import Now, best, check
from tiny_families import prompt, tiny
from torch import Tensor

from manyheads.hosts.visibility import Visibility
from manyheads.shrink import CUR, AdaKV, KeyDiff, LagKV, Policy


def norm(row: Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in row))


def test_keydiff() -> None:
    def rule(now: Now) -> list[int]:
        pointing = [now.keys[slot] / norm(now.keys[slot]) for slot in now.held]
        anchor = sum(pointing) / len(pointing)
        score = {s: -float(now.keys[s] @ anchor) / norm(now.keys[s]) / norm(anchor) for s in now.held}
        return best(score, math.floor(now.real * 0.5))

    check(KeyDiff(compression_ratio=0.5), rule)


def lag(now: Now, sinks: int, size: int, cross: bool) -> dict[int, tuple[float, ...]]:
    """Scores that compare as tuples: protected above scored ones."""
    rest = now.held[sinks:]
    cut = [rest[i : i + size] for i in range(0, len(rest) - size + 1, size)]
    score: dict[int, tuple[float, ...]] = {slot: (1.0, float(slot)) for slot in now.held}
    score |= dict.fromkeys(now.held[:sinks], (2.0, 0.0))
    for place, (own, then) in enumerate(itertools.pairwise(cut)):
        total = dict.fromkeys(own, 0.0)
        for rows in (now.keys, now.values):
            size_of = len(rows[own[0]])
            spread = []
            for slot in own:
                placed = []
                for i in range(size_of):
                    reference = [float(rows[other][i]) for other in then]
                    span = max(reference) - min(reference)
                    placed.append((float(rows[slot][i]) - min(reference)) / span)
                mean = sum(placed) / size_of
                spread.append(math.sqrt(sum((x - mean) ** 2 for x in placed) / (size_of - 1)))
            weights = [math.exp(x) for x in spread]
            for slot, weight in zip(own, weights, strict=True):
                total[slot] += weight / sum(weights)
        ranked = sorted(own, key=lambda slot: total[slot])
        for slot in own:
            score[slot] = (0.0, total[slot]) if cross else (0.0, float(ranked.index(slot)), float(place))
    return score


@pytest.mark.parametrize("cross", [False, True])
def test_lagkv(cross: bool) -> None:
    def rule(now: Now) -> list[int]:
        score = lag(now, 2, 4, cross)
        return sorted(score, key=lambda slot: score[slot], reverse=True)[:15]

    check(LagKV(budget_tokens=15, sink_size=2, lag_size=4, cross_scoring=cross), rule)


def test_lagkv_of_a_short_text() -> None:
    """Without two stretches after the sinks: sinks and the latest."""

    def rule(now: Now) -> list[int]:
        return now.held[:2] + now.held[2:][-9:]

    check(LagKV(budget_tokens=11, sink_size=2, lag_size=40), rule)


def test_lagkv_where_a_feature_stands_still() -> None:
    """A feature that does not vary in the stretch that is looked at divides nothing by zero."""
    model = tiny("llama").double()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data[::3] = 0
    cache = LagKV(budget_tokens=15, sink_size=2, lag_size=4).make_cache(model)
    with torch.no_grad():
        out = model(prompt(2, 30), past_key_values=cache)
        more = model(prompt(2, 1), past_key_values=cache)
    assert bool(out.logits.isfinite().all())
    assert bool(more.logits.isfinite().all())
    assert cache.lengths() == [[15, 15]] * 3


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize("leverage", ["key", "value", "mean", "product"])
def test_cur(leverage: str, window: int | None) -> None:
    def rule(now: Now) -> list[int]:
        share: dict[str, dict[int, float]] = {}
        step = window or len(now.held)
        for name, rows in (("key", now.keys), ("value", now.values)):
            squares = {slot: norm(rows[slot]) ** 2 for slot in now.held}
            share[name] = {}
            for start in range(0, len(now.held), step):
                own = now.held[start : start + step]
                share[name] |= {slot: squares[slot] / sum(squares[s] for s in own) for slot in own}
        k, v = share["key"], share["value"]
        made = {"key": lambda s: k[s], "value": lambda s: v[s], "mean": lambda s: k[s] + v[s]}
        score = {s: made.get(leverage, lambda s: k[s] * v[s])(s) for s in now.held}
        return best(score | dict.fromkeys(now.held[:2], math.inf), 12)

    check(CUR(budget_tokens=12, sink_size=2, leverage=leverage, local_window=window), rule)


def test_cur_by_a_sketch() -> None:
    """Norms of rows times one Gaussian matrix, the same for keys and values and in every run."""
    draw = torch.Generator().manual_seed(3)
    matrix = torch.randn(8, 4, generator=draw, dtype=torch.float64) / 2

    def rule(now: Now) -> list[int]:
        k, v = ({s: norm(rows[s] @ matrix) ** 2 for s in now.held} for rows in (now.keys, now.values))
        return best({s: k[s] * v[s] for s in now.held} | {now.held[0]: math.inf}, 12)

    check(CUR(budget_tokens=12, sink_size=1, local_window=None, sketch=4, seed=3), rule)


BY_ROWS: list[tuple[type[Policy], dict[str, Any]]] = [
    (KeyDiff, {}),
    (LagKV, {"sink_size": 2, "lag_size": 4}),
    (CUR, {"sink_size": 2}),
]


@pytest.mark.parametrize(("cls", "own"), BY_ROWS)
def test_what_padding_holds_counts_nothing(cls: Any, own: dict[str, Any]) -> None:
    """A row on its own keeps what it keeps beside a longer one, at the same places of its text, in AdaKV's shares too;
    with padding whose rows are infinite."""
    model = tiny("llama").double()
    tokens = prompt(2, 30)
    padding = torch.ones(2, 30, dtype=torch.long)
    padding[1, :6] = 0

    def kept(rows: Tensor, mask: Tensor, allocation: Any) -> list[Any]:
        cache = cls(compression_ratio=0.5, **own, allocation=allocation, when="prefill").make_cache(model)
        with torch.no_grad():
            model(rows, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=cache)
        last = []
        for layer in cache.layers:
            for group in layer.store.groups:
                slots = group.slots().expand(rows.shape[0], len(group.heads), -1)[-1]
                last += [
                    (layer.index, head, sorted(s - 30 for s in one.tolist() if mask[-1, s] and s >= 0))
                    for head, one in zip(group.heads, slots, strict=True)
                ]
        return sorted(last)

    alone = [(a, b, [s + 6 for s in slots]) for a, b, slots in kept(tokens[1:, 6:], padding[1:, 6:], None)]
    assert kept(tokens, padding, None) == alone
    shares = kept(tokens[:1], padding[:1], AdaKV())
    assert sum(len(slots) for _, _, slots in shares) == 3 * 2 * 15


@pytest.mark.parametrize(("cls", "own"), BY_ROWS)
def test_documents_packed_into_rows_are_refused(cls: Any, own: dict[str, Any]) -> None:
    """A library's mask that is more than causal; with a cache it makes none of position ids alone."""
    cut = Visibility(lambda b, h, i, j: (j <= i) & (j >= 10), None, 0, plain=False, rows=torch.arange(1))
    view: Any = SimpleNamespace(passes=[SimpleNamespace(seen=cut)])
    with pytest.raises(ValueError, match=rf"{cls.__name__} .*several documents"):
        cls(budget_tokens=8, **own).score(view)


@pytest.mark.parametrize(("cls", "given", "match"), [
    (KeyDiff, {"budget_tokens": 0}, "budget_tokens must be"),
    (LagKV, {"lag_size": 0}, "LagKV: lag_size must be a whole number of at least 1; got 0"),
    (LagKV, {"sink_size": 2.0}, "LagKV: sink_size must be a whole number of at least 0; got 2.0"),
    (LagKV, {"budget_tokens": 4}, "below the 5"),
    (CUR, {"leverage": "kv"}, "CUR: leverage is one of key, value, mean, product; got 'kv'"),
    (CUR, {"local_window": 0}, "CUR: local_window"),
    (CUR, {"sketch": True}, "CUR: sketch"),
])  # fmt: skip
def test_what_is_refused(cls: Any, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cls(**given)
