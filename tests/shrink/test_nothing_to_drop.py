"""A budget that covers every token is no budget: the dense cache's logits, whatever the policy, however it is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fast_kvzip import gates
from tiny_families import prompt, shallow
from torch import Tensor
from transformers import DynamicCache

from manyheads.shrink import (
    CUR,
    H2O,
    TOVA,
    AdaKV,
    ChunkKV,
    Compactor,
    CriticalKV,
    Duo,
    ExpectedAttention,
    FastKVzip,
    Finch,
    KeyDiff,
    KeyNorm,
    KVzip,
    LagKV,
    Leverage,
    LoCoCo,
    LongHeads,
    MoA,
    NonCausal,
    Policy,
    PyramidKV,
    QFilters,
    Razor,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    policies,
    release,
)

TOKENS = 24
# Prompt, a token, a second turn, one token more.
ENDS = (11, 12, 23, TOKENS)
GATES = [[0.9, 0.1], [0.2, 0.8]]
# Whatever a policy keeps besides its budget is made as small as may be, so that anything dropped is seen.
SMALL: dict[type[Policy], dict[str, Any]] = {
    StreamingLLM: {"sink_size": 2},
    KeyNorm: {},
    TOVA: {},
    H2O: {},
    SnapKV: {"window_size": 3, "kernel_size": 3},
    ExpectedAttention: {"sink_size": 2},
    Duo: {"gates": GATES, "sink_size": 1, "recent_size": 2},
    Razor: {"retrieval": [(0, 1)], "sink_size": 1, "recent_floor": 2},
    KeyDiff: {},
    LagKV: {"sink_size": 2, "lag_size": 3},
    CUR: {"sink_size": 2, "local_window": 3},
    ChunkKV: {"base": SnapKV(window_size=3, kernel_size=1), "chunk_length": 2},
    CriticalKV: {"base": SnapKV(window_size=3, kernel_size=1)},
    Finch: {"window_size": 3},
    KVzip: {"sink_size": 2},
    QFilters: {"filters": torch.ones(2, 2, 8)},
    Leverage: {},
    NonCausal: {"chunk_size": 3},
    Compactor: {"sink_size": 1, "recent_size": 1, "chunk_size": 3},
    FastKVzip: {"gates": gates(2), "sink_size": 2},
    LoCoCo: {"mem_compress": 2, "recent_size": 2},
}
COVERING: dict[str, dict[str, Any]] = {
    "ratio": {"compression_ratio": 0.0},
    "exactly": {"budget_tokens": TOKENS},
    "per layer": {"budget_tokens": 2 * TOKENS, "budget_per": "layer"},
    "per model": {"budget_tokens": 4 * TOKENS, "budget_per": "model"},
    "beyond the positions": {"budget_tokens": 10**6},
    "bytes": {"budget_bytes": 10**6},
}
# Heads that keep everything have no byte budget.
BY_HEAD = (Duo, Razor)
# Which heads keep how much is the method itself.
ALLOTTED = (*BY_HEAD, ChunkKV, KVzip, FastKVzip)
ALLOCATIONS = (None, AdaKV(), PyramidKV())
# Where nothing is to be dropped, or the budget is far above everything, the shares of heads and layers are too.
ROOMY = ("ratio", "beyond the positions", "bytes")


def cases() -> list[Any]:
    found = [
        pytest.param(
            cls,
            own | budget,
            ALLOCATIONS[: 1 if cls in ALLOTTED or name in ROOMY else None],
            id=f"{cls.__name__}-{name}",
        )
        for cls, own in SMALL.items()
        for name, budget in COVERING.items()
        if not (name == "bytes" and cls in BY_HEAD)
    ]
    for cls, settings in (
        (MoA, {"rule": (0, 1), "sink_size": 0}),
        (LongHeads, {"budget_tokens": 32, "chunk_size": 8}),
        (TidalDecode, {"budget_tokens": 32, "sparse_layer_start": 0}),
        (SimLayerKV, {"lazy_threshold": 1.0}),
        (SimLayerKV, {"lazy_threshold": 0.0, "recent_size": TOKENS}),
    ):
        found.append(pytest.param(cls, settings, (None,), id=cls.__name__))
    return found


def test_no_policy_is_left_out() -> None:
    exported = {getattr(policies, name) for name in policies.__all__}
    known = {own for own in exported if isinstance(own, type) and issubclass(own, Policy)}
    assert known == {*SMALL, MoA, LongHeads, SimLayerKV, TidalDecode, policies.Full, policies.Composed}


def turns(model: Any, cache: Any, tokens: Tensor, padding: Tensor) -> Tensor:
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    logits, start = [], 0
    for end in ENDS:
        with torch.no_grad():
            out = model(
                tokens[:, start:end],
                attention_mask=padding[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        logits.append(out.logits[padding[:, start:end].bool()])
        start = end
    return torch.cat(logits)


@pytest.fixture(scope="module")
def dense() -> tuple[Any, Tensor, Tensor, Tensor]:
    """A model, a batch of which the second row is padded on the left, and the dense cache's logits."""
    model = shallow("llama")
    tokens, padding = prompt(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
    padding[1, :5] = 0
    return model, tokens, padding, turns(model, DynamicCache(config=model.config), tokens, padding)


@pytest.mark.parametrize(("cls", "settings", "allocations"), cases())
def test_nothing_is_dropped(dense: Any, cls: Any, settings: dict[str, Any], allocations: Any) -> None:
    model, tokens, padding, wanted = dense
    for allocation in allocations:
        cache = cls(**settings, allocation=allocation).make_cache(model)
        given = turns(model, cache, tokens, padding)
        release(model)
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
        assert cache.lengths() == [[TOKENS, TOKENS]] * 2


def test_a_ratio_of_nothing_beside_other_rules() -> None:
    with pytest.raises(ValueError, match="leave compression_ratio out"):
        MoA(rule=(0, 1), compression_ratio=0.0)
    assert bool(Duo(gates=GATES, compression_ratio=0.0).full.all())
    assert int(Duo(gates=GATES, budget_tokens=99).full.sum()) == 2


@pytest.mark.parametrize("cls", [StreamingLLM, SnapKV, H2O, KeyNorm, ExpectedAttention], ids=lambda own: own.__name__)
@pytest.mark.parametrize(
    "budget", [{"budget_tokens": 6}, {"budget_tokens": 24, "budget_per": "model"}], ids=["head", "model"]
)
def test_a_pyramid_stands_on_what_every_head_keeps(cls: Any, budget: dict[str, Any]) -> None:
    """Its top layers may not need more than their share: the whole must stay within the budget."""
    model = shallow("llama")
    cache = cls(**SMALL[cls], **budget, allocation=PyramidKV()).make_cache(model)
    tokens, padding = prompt(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
    with torch.no_grad():
        model(tokens, attention_mask=padding, past_key_values=cache)
    held = [length for layer in cache.lengths() for length in layer]
    assert min(held) >= cls(**SMALL[cls]).smallest
    assert 24 - 2 * 2 < sum(held) <= 24


@pytest.mark.parametrize("cls", SMALL)
@pytest.mark.parametrize("name", ["budget_tokens", "budget_bytes"])
def test_a_budget_that_cannot_be_met(cls: Any, name: str) -> None:
    """Too little for what every head keeps is said at once, or with the first tokens where it depends on the model."""
    least = cls(**SMALL[cls]).smallest
    if least == 1 or (name == "budget_bytes" and cls in BY_HEAD):
        return
    model = shallow("llama")
    short = {"budget_tokens": (least - 1) * 4, "budget_per": "model"} if name == "budget_tokens" else {name: 500}
    cache = cls(**SMALL[cls], **short).make_cache(model)
    with pytest.raises(ValueError, match=rf"{name}={short[name]} comes to .* always keeps {least}"):
        model(prompt(1, TOKENS), past_key_values=cache)
