"""Q-Filters, leverage, attention both ways and their blend: rules in loops and float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LEFT, Now, best, check
from safetensors.torch import save_file
from test_expected import rotation
from tiny_families import prompt, tiny
from torch import Tensor

from manyheads.hosts.taps import record
from manyheads.shrink import AdaKV, Compactor, Leverage, NonCausal, QFilters, fit_q_filters
from manyheads.shrink.outliers import sketches


def at_prefill(now: Now, budget: int, score: dict[int, float]) -> list[int]:
    return now.held if now.decoding or len(now.held) <= budget else best(score, budget)


# -- Q-Filters ---------------------------------------------------------------------------------------------------------


def test_q_filters() -> None:
    table = torch.randn(3, 2, 8, dtype=torch.float64)

    def rule(now: Now) -> list[int]:
        own = table[now.layer, now.head].tolist()
        score = {s: -sum(float(k) * f for k, f in zip(now.keys[s], own, strict=True)) for s in now.held}
        return best(score, 12)

    check(QFilters(filters=table, budget_tokens=12), rule)


def test_filters_of_a_models_queries() -> None:
    model = tiny("llama").double()
    texts = [prompt(2, 20), prompt(1, 31, seed=4)]
    table = fit_q_filters(model, texts)
    queries: dict[int, list[Tensor]] = {}
    for text in texts:
        with record(model) as calls, torch.no_grad():
            model(text, use_cache=False)
        for call in calls:
            queries.setdefault(call.layer, []).append(call.query.transpose(0, 1).flatten(1, 2))
    for layer, own in queries.items():
        for head in range(2):
            total = torch.zeros(8, dtype=torch.float64)
            for each in (2 * head, 2 * head + 1):
                rows = torch.cat([part[each] for part in own])
                along = torch.linalg.svd(rows).Vh[0]
                total += along * torch.sign(rows.mean(0) @ along)
            torch.testing.assert_close(table[layer, head], -total.float() / 2)
    assert model.training is False


def test_filters_from_a_file(tmp_path: Path) -> None:
    table = torch.randn(3, 2, 8)
    save_file({"q_filters": table}, tmp_path / "model.safetensors")
    for given in (tmp_path, str(tmp_path / "model.safetensors"), table.tolist()):
        torch.testing.assert_close(QFilters(filters=given).table, table)
    with pytest.raises(ValueError, match=r"is no file and no folder.*fit_q_filters"):
        QFilters(filters=tmp_path / "none")
    save_file({"other": table}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds other; want q_filters"):
        QFilters(filters=tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match=r"is no \.safetensors file"):
        QFilters(filters=tmp_path / "text.safetensors")


def test_filters_of_another_model() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"filters are of 2 layers and LlamaForCausalLM has 3"):
        QFilters(filters=torch.ones(2, 2, 8), budget_tokens=8).make_cache(model)
    for shape in ((3, 4, 8), (3, 2, 4)):
        cache = QFilters(filters=torch.ones(shape), budget_tokens=8).make_cache(model)
        with pytest.raises(ValueError, match=rf"filters are for {shape[1]} KV heads of {shape[2]} features"):
            model(prompt(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match=r"must be a table \[layers, KV heads, d\]"):
        QFilters(filters=[[1.0]])
    with pytest.raises(ValueError, match=r"ids must be \[rows, n\]"):
        fit_q_filters(model, torch.ones(4, dtype=torch.long))


# -- leverage ----------------------------------------------------------------------------------------------------------


def leverages(now: Now, slots: list[int], sketch: Tensor | None, turning: int) -> dict[int, float]:
    size = len(now.keys[slots[0]])
    rows = torch.stack([rotation(-(s - now.first_real), size, turning) @ now.keys[s] for s in slots])
    centred = rows - rows.mean(0)
    if sketch is not None:
        centred = centred @ sketch
    inverse = torch.linalg.inv(centred.T @ centred + 0.01 * torch.eye(centred.shape[1], dtype=torch.float64))
    return {slot: float(row @ inverse @ row) for slot, row in zip(slots, centred, strict=True)}


@pytest.mark.parametrize(("family", "turning", "settings"), [
    ("llama", 8, {"sketch_dimension": None}),
    ("llama", 8, {"sketch_dimension": 5, "seed": 3}),
    ("gpt_neox", 2, {"sketch_dimension": 5}),
    ("gpt2", 0, {"sketch_dimension": None, "rotary": False}),
])  # fmt: skip
def test_leverage(family: str, turning: int, settings: dict[str, Any]) -> None:
    policy = Leverage(budget_tokens=12, **settings)

    def rule(now: Now) -> list[int]:
        sketch, heads = None, len(now.heads)
        if policy.sketch_dimension is not None:
            sketch = sketches(now.layer, heads, len(now.keys[now.held[0]]), policy.sketch_dimension, policy.seed)
            sketch = sketch[now.head]
        return at_prefill(now, 12, leverages(now, now.held, sketch, turning))

    check(policy, rule, family)


def test_leverage_where_keys_are_few_or_equal() -> None:
    """Fewer tokens than features, and the same token again and again: no inverse is needed to exist."""
    model = tiny("llama")
    for tokens in (prompt(1, 9), torch.full((1, 9), 5)):
        cache = Leverage(budget_tokens=4).make_cache(model)
        with torch.no_grad():
            assert bool(model(tokens, past_key_values=cache).logits.isfinite().all())
        assert cache.lengths() == [[4, 4]] * 3


# -- attention both ways -----------------------------------------------------------------------------------------------


def both_ways(now: Now, size: int, slots: list[int]) -> dict[int, float]:
    """Of the tokens of one pass, at slots of it."""
    total = dict.fromkeys(slots, 0.0)
    for start in range(0, len(slots), size):
        chunk = slots[start : start + size]
        for repeat in now.queries:
            for asking in chunk:
                scores = {s: math.exp(float(repeat[asking - now.since] @ now.keys[s])) for s in chunk}
                for slot in chunk:
                    total[slot] += scores[slot] / sum(scores.values()) / len(now.queries)
    return total


def smooth(now: Now, asked: dict[int, float], slots: list[int]) -> dict[int, float]:
    sized = [asked[s] * float(now.values[s].norm()) for s in slots]
    near = [0.0, *sized, 0.0]
    return {s: sum(near[i : i + 3]) / 3 for i, s in enumerate(slots)}


@pytest.mark.parametrize("when", ["prefill", "both"])
@pytest.mark.parametrize("size", [6, 100])
def test_non_causal(size: int, when: str) -> None:
    known: dict[tuple[int, int, int], dict[int, float]] = {}

    def rule(now: Now) -> list[int]:
        own = known.setdefault((now.layer, now.row, now.head), {})
        own |= both_ways(now, size, [s for s in now.held if s >= now.since])
        score = smooth(now, own, now.held)
        return at_prefill(now, 12, score) if when == "prefill" else best(score, 12)

    check(NonCausal(budget_tokens=12, chunk_size=size, when=when), rule)


def standard(heads: list[dict[int, float]]) -> list[dict[int, float]]:
    every = [value for own in heads for value in own.values()]
    mean = sum(every) / len(every)
    spread = math.sqrt(sum((value - mean) ** 2 for value in every) / (len(every) - 1))
    return [{slot: (value - mean) / spread for slot, value in own.items()} for own in heads]


@pytest.mark.parametrize(
    "settings", [{"compression_ratio": 0.5}, {"budget_tokens": 12}, {"budget_tokens": 12, "blending": 2.0}]
)
def test_compactor(settings: dict[str, Any]) -> None:
    policy = Compactor(sink_size=2, recent_size=3, chunk_size=6, sketch_dimension=5, **settings)
    asked: dict[tuple[int, int, int], dict[int, float]] = {}

    def rule(now: Now) -> list[int]:
        for head in now.heads:
            first = now.first_real + 2
            cut = [s for s in head.held if max(head.since, first) <= s < head.seen - 3]
            own = asked.setdefault((head.layer, head.row, head.head), {})
            own |= {s: 1.0 for s in head.held if s >= head.since} | (both_ways(head, 6, cut) if cut else {})
        budget = settings.get("budget_tokens", now.real // 2)
        if now.decoding or len(now.held) <= budget:
            return now.held
        outlying, looked = [], []
        for head in now.heads:
            inner = [s for s in head.held if now.first_real + 2 <= s < now.seen - 3]
            sketch = sketches(now.layer, 2, 8, 5, 0)[head.head]
            outlying.append(leverages(head, inner, sketch, 8))
            looked.append(smooth(head, asked[head.layer, head.row, head.head], inner))
        weight = settings.get("blending", settings.get("compression_ratio", 1 - budget / now.real))
        a, b = standard(outlying)[now.head], standard(looked)[now.head]
        score = {s: weight * a[s] + b[s] if s in a else math.inf for s in now.held}
        return best(score, budget)

    check(policy, rule)


@pytest.mark.parametrize("policy", [
    Compactor(compression_ratio=0.5, sink_size=2, recent_size=2, chunk_size=5, when="prefill"),
    NonCausal(compression_ratio=0.5, chunk_size=5),
    Leverage(compression_ratio=0.5, allocation=AdaKV()),
    QFilters(filters=torch.ones(3, 2, 8), compression_ratio=0.5, when="prefill"),
], ids=lambda own: type(own).__name__)  # fmt: skip
def test_turns_of_a_padded_batch(policy: Any) -> None:
    """A second turn and beams go on; with AdaKV's shares too."""
    model = tiny("llama")
    tokens, padding = prompt(2, 30), torch.ones(2, 30, dtype=torch.long)
    padding[1, : LEFT[1]] = 0
    with policy(model) as active:
        first = model.generate(tokens, attention_mask=padding, max_new_tokens=4, do_sample=False, eos_token_id=None)
        longer = torch.cat([first, prompt(2, 7, seed=3)], 1)
        mask = torch.cat([padding, torch.ones(2, longer.shape[1] - 30, dtype=torch.long)], 1)
        more = model.generate(longer, attention_mask=mask, max_new_tokens=3, past_key_values=active.cache)
        assert more.shape[1] <= longer.shape[1] + 3
        model.generate(tokens, attention_mask=padding, max_new_tokens=3, num_beams=2, do_sample=False)
    assert active.cache is not None
    assert active.cache.lengths()[0][0] < 30


@pytest.mark.parametrize(("cls", "given", "match"), [
    (Leverage, {"sketch_dimension": 0}, "sketch_dimension must be a whole number of at least 1"),
    (NonCausal, {"chunk_size": 0}, "chunk_size must be a whole number of at least 1"),
    (Compactor, {"sink_size": -1}, "sink_size must be a whole number of at least 0"),
    (Compactor, {"blending": -0.5}, "blending weighs leverage"),
    (Compactor, {"sketch_dimension": 1.5}, "Compactor: sketch_dimension"),
    (Compactor, {"when": "both"}, "when='both' is not possible"),
    (Compactor, {"budget_tokens": 12}, "below the 13"),
])  # fmt: skip
def test_what_is_refused(cls: Any, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cls(**given)


@pytest.mark.parametrize("cls", [Leverage, Compactor])
def test_models_without_rotations(cls: Any) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__} cannot turn keys back.*no rotary positions.*rotary=False"):
        cls(budget_tokens=16).make_cache(tiny("gpt2"))
    cache = cls(budget_tokens=16, rotary=False).make_cache(tiny("gpt2"))
    assert all(layer.angles is None for layer in cache.layers)
