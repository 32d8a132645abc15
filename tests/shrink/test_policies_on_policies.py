"""Policies on top of another's scores: ChunkKV and CriticalKV."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import LEFT, Now, best, check
from tiny_families import prompt, tiny
from torch import nn

from manyheads.shrink import (
    H2O,
    TOVA,
    AdaKV,
    ChunkKV,
    Compactor,
    CriticalKV,
    Duo,
    ExpectedAttention,
    KeyNorm,
    LagKV,
    Policy,
    SnapKV,
    StreamingLLM,
)
from manyheads.shrink.policies.criticalkv import output_maps, projected
from manyheads.shrink.variants import Profiles, read_variants

Score = Callable[[Now], dict[int, float]]


def norms(now: Now) -> dict[int, float]:
    return {slot: -math.sqrt(sum(float(x) ** 2 for x in now.keys[slot])) for slot in now.held}


def window(now: Now, size: int = 3) -> dict[int, float]:
    """SnapKV without pooling: mean attention of the last queries, and the window protected."""
    repeat, n = now.queries.shape[:2]
    votes = dict.fromkeys(now.held, 0.0)
    asked = [place for place in range(n - size, n) if now.since + place >= now.first_real]
    for place in asked:
        for query in now.queries[:, place]:
            for slot, weight in now.look(query, now.since + place).items():
                votes[slot] += weight / len(asked) / repeat
    return {slot: math.inf if slot >= now.seen - size else vote for slot, vote in votes.items()}


@pytest.mark.parametrize(
    ("base", "score"), [(KeyNorm(), norms), (SnapKV(window_size=3, kernel_size=1), window)], ids=["norms", "window"]
)
def test_chunkkv(base: Policy, score: Score) -> None:
    length, budget = 4, 14

    def rule(now: Now) -> list[int]:
        if now.decoding or len(now.held) <= budget:
            return now.held
        totals = dict.fromkeys(range(len(now.held)), 0.0)
        for head in now.heads:
            own = score(head)
            for place, slot in enumerate(head.held):
                totals[place] += own[slot]
        chunks = [list(range(i, min(i + length, len(now.held)))) for i in range(0, len(now.held), length)]
        chunks.sort(key=lambda chunk: -sum(totals[place] for place in chunk) / len(chunk))
        kept: list[int] = []
        for chunk in chunks:
            if len(kept) + len(chunk) > budget:
                break
            kept += chunk
        return [now.held[place] for place in kept]

    check(ChunkKV(base=base, chunk_length=length, budget_tokens=budget), rule)


def written(now: Now, model: Any) -> dict[int, float]:
    """||W_O v||_1, mean over the query heads of the KV head."""
    matrix = model.model.layers[now.layer].self_attn.o_proj.weight.detach()
    repeat = now.queries.shape[0]
    size = len(next(iter(now.values.values())))
    found = {}
    for slot in now.held:
        total = 0.0
        for head in range(now.head * repeat, (now.head + 1) * repeat):
            total += sum(abs(float(row[head * size : (head + 1) * size] @ now.values[slot])) for row in matrix)
        found[slot] = total / repeat
    return found


def critical(score: Score, budget: int, share: float) -> Callable[[Now], list[int]]:
    model = tiny("llama").double()

    def rule(now: Now) -> list[int]:
        own, weight = score(now), written(now, model)
        sure = best(own, max(1, int(budget * share)) if share else 0)
        ranked = {slot: (own[slot] + 0.05) * weight[slot] for slot in now.held} | dict.fromkeys(sure, math.inf)
        return best(ranked, budget)

    return rule


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_criticalkv(share: float) -> None:
    rule = critical(window, 12, share)
    check(
        CriticalKV(base=SnapKV(window_size=3, kernel_size=1), budget_tokens=12, first_stage_ratio=share, epsilon=0.05),
        lambda now: now.held if now.decoding or len(now.held) <= 12 else rule(now),
    )


def test_criticalkv_while_decoding() -> None:
    """Norms are kept beside the entries then."""

    def last(now: Now) -> dict[int, float]:
        votes = dict.fromkeys(now.held, 0.0)
        for query in now.queries[:, -1]:
            for slot, weight in now.look(query, now.seen - 1).items():
                votes[slot] += weight / len(now.queries)
        return votes

    check(CriticalKV(base=TOVA(), budget_tokens=12, when="both", epsilon=0.05), critical(last, 12, 0.5))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "gpt_oss"])
def test_the_map_is_found_and_called(family: str) -> None:
    """Of every family; values that are few and values that are many alike; bias left out, what is around it counted."""
    model = tiny(family).double()
    outputs = output_maps(model, 3)
    heads = model.config.num_attention_heads
    dv = 32 // heads if family in ("gpt2", "gpt_neox") else 8
    values = torch.randn(2, 9, dv, dtype=torch.float64)
    given = torch.zeros(2, 9, heads, dv, dtype=torch.float64)
    given[:, :, 1] = values
    wanted = outputs[1](given.flatten(2)) - outputs[1](torch.zeros_like(given).flatten(2))
    torch.testing.assert_close(projected(outputs[1], values, 1, 1), wanted.abs().sum(-1))
    torch.testing.assert_close(projected(outputs[1], values[:, :2], 1, 1), wanted.abs().sum(-1)[:, :2])

    class Doubled(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.weight = base, base.weight
            self.in_features = heads * dv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base_layer(x)

    torch.testing.assert_close(projected(Doubled(outputs[1]), values, 1, 1), 2 * wanted.abs().sum(-1))


def test_the_bases_own_preparations() -> None:
    """A base that notes, observes and needs the model's rotations keeps what it needs."""
    model = tiny("llama")
    for base in (H2O(), ExpectedAttention(sink_size=2, use_vnorm=False), LagKV(sink_size=2, lag_size=4), KeyNorm()):
        for policy in (
            CriticalKV(base=base, budget_tokens=12, when="both"),
            CriticalKV(base=base, budget_tokens=12, allocation=AdaKV()),
            ChunkKV(base=base, budget_tokens=12, chunk_length=3),
        ):
            with policy(model) as active:
                model.generate(prompt(2, 30), max_new_tokens=6, do_sample=False)
            assert active.cache is not None
            held = active.cache.lengths()
            most = 12 if policy.when == "both" else 12 + 5
            assert all(sum(own) <= 2 * most for own in held), (policy, held)


def test_left_padding_moves_the_chunks_along() -> None:
    """Chunks are cut from each row's first token on."""
    model = tiny("llama").double()
    tokens, padding = prompt(2, 30), torch.ones(2, 30, dtype=torch.long)
    padding[1, : LEFT[1]] = 0
    policy = ChunkKV(base=KeyNorm(), chunk_length=5, budget_tokens=10)
    cache, alone = policy.make_cache(model), policy.make_cache(model)
    with torch.no_grad():
        positions = (padding.cumsum(1) - 1).clamp_min(0)
        model(tokens, attention_mask=padding, position_ids=positions, past_key_values=cache)
        model(tokens[1:, LEFT[1] :], past_key_values=alone)
    for two, one in zip(cache.layers, alone.layers, strict=True):
        slots = two.store.groups[0].slots()[1, 0].sort().values - LEFT[1]
        assert slots.tolist() == one.store.groups[0].slots()[0, 0].sort().values.tolist()


@pytest.mark.parametrize("cls", [ChunkKV, CriticalKV])
def test_bases_that_score_no_tokens(cls: Any) -> None:
    for base in (StreamingLLM(), Duo(gates=[[1.0]]), Policy()):
        with pytest.raises(ValueError, match=rf"{cls.__name__}: base={type(base).__name__} gives no score"):
            cls(base=base)
    with pytest.raises(ValueError, match="base is a policy such as"):
        cls(base="snapkv")
    with pytest.raises(ValueError, match=rf"budget_tokens is {cls.__name__}'s own to say"):
        cls(base=KeyNorm(budget_tokens=4))
    with pytest.raises(ValueError, match="when='both' is not possible"):
        cls(base=Compactor(), when="both")


@pytest.mark.parametrize(("cls", "given", "match"), [
    (ChunkKV, {"chunk_length": 0}, "chunk_length must be a whole number of at least 1"),
    (ChunkKV, {"allocation": AdaKV()}, "all heads of a layer keep the same chunks"),
    (ChunkKV, {"base": KeyNorm(), "budget_tokens": 19}, "below the 20 that it always keeps"),
    (ChunkKV, {"base": SnapKV(window_size=8), "budget_tokens": 40}, "below the 48 that it always keeps"),
    (CriticalKV, {"epsilon": -1.0}, "epsilon is added"),
    (CriticalKV, {"first_stage_ratio": 1.5}, "first_stage_ratio is a share"),
    (CriticalKV, {"base": SnapKV(window_size=8), "budget_tokens": 8}, "below the 9"),
])  # fmt: skip
def test_what_is_refused(cls: Any, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cls(**given)


def test_from_the_command_line() -> None:
    loaded: Any = type("Loaded", (), {"name": "x"})()
    texts = ["chunkkv[base=snapkv(window_size=8),chunk_length=4]", "criticalkv[base=keydiff]"]
    found = [own.build() for own in read_variants(texts, [("compression_ratio", 0.5)], Profiles(loaded, None))]
    assert [type(own.base).__name__ for own in found] == ["SnapKV", "KeyDiff"]  # type: ignore[attr-defined]
    assert found[0].base.window_size == 8  # type: ignore[attr-defined]
