"""Guessing ahead changes no text: a shrunk draft, a shrunk target, or both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorder import held
from tiny_families import prompt, tiny
from torch import Tensor

from manyheads.shrink import (
    H2O,
    TOVA,
    AdaKV,
    Duo,
    ExpectedAttention,
    Full,
    KeyNorm,
    LoCoCo,
    LongHeads,
    MoA,
    Policy,
    PyramidKV,
    Quantised,
    Razor,
    SnapKV,
    StreamingLLM,
    TidalDecode,
)

GATES = [[0.9, 0.1], [0.2, 0.8]]
POLICIES: dict[str, Policy] = {
    "full": Full(),
    "streaming": StreamingLLM(budget_tokens=8, sink_size=2),
    "snapkv": SnapKV(budget_tokens=8, window_size=3),
    "snapkv ratio": SnapKV(compression_ratio=0.5, window_size=3, allocation=AdaKV()),
    "h2o": H2O(budget_tokens=8),
    "tova": TOVA(budget_tokens=8, interval=3),
    "keynorm": KeyNorm(compression_ratio=0.5, allocation=PyramidKV(beta=4)),
    "keynorm decode": KeyNorm(budget_tokens=8, when="decode"),
    "keynorm prefill": KeyNorm(budget_tokens=8, when="prefill", allocation=AdaKV()),
    "expected": ExpectedAttention(interval=1, budget_tokens=8, sink_size=2),
    "duo": Duo(gates=GATES, sink_size=1, recent_size=4, compression_ratio=0.5),
    "duo tokens": Duo(gates=GATES, sink_size=1, recent_size=4, budget_tokens=8),
    "razor": Razor(retrieval=[(0, 1)], sink_size=1, recent_floor=4),
    "lococo": LoCoCo(budget_tokens=8, mem_compress=2, recent_size=3),
    "moa": MoA(rule=(3, 0.2), sink_size=1),
    "longheads": LongHeads(budget_tokens=12, chunk_size=4),
    "tidal": TidalDecode(budget_tokens=8, sparse_layer_start=0),
    "quantised": H2O(budget_tokens=16, storage=Quantised(bits=8, residual=4)),
}
WAYS = ("lookup", "draft", "early exit")
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0}


def guessing(way: str, draft: Any) -> dict[str, Any]:
    own: dict[str, dict[str, Any]] = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "draft": {"assistant_model": draft},
        "early exit": {"assistant_early_exit": 1},
    }
    return own[way]


def small(family: str, **changes: Any) -> Any:
    model = tiny(family, **{"num_hidden_layers": 2, **changes})
    model.generation_config.num_assistant_tokens = 4
    return model


def repeating(length: int) -> Tensor:
    return prompt(1, 5).repeat(1, length // 5 + 1)[:, :length]


def everything_held(cache: Any) -> list[Any]:
    return [held(layer) for layer in cache.layers]


# Windows and soft caps with a few of them. Where rotation alone tells equal tokens apart the norms of their keys tie.
NORMS = [name for name in POLICIES if "keynorm" in name]
WINDOWED = ("full", "streaming", "snapkv", "h2o")
CASES = [("gpt2" if name in NORMS else "llama", name) for name in POLICIES] + [("gemma2", name) for name in WINDOWED]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_shrunk_target_says_what_it_says_alone(family: str, name: str) -> None:
    policy, model, draft = POLICIES[name], small(family), small("llama", num_hidden_layers=1)
    tokens = repeating(16)
    with policy(model) as active:
        wanted = model.generate(tokens, **SETTINGS)
        kept = active.cache.lengths()
        # Guesses out of the text itself: below, and in windows.
        for way in WAYS if family == "gemma2" else WAYS[1:]:
            torch.testing.assert_close(model.generate(tokens, **SETTINGS, **guessing(way, draft)), wanted)
            # Exact ties between repeated tokens may fall otherwise, so only how many are held.
            assert active.cache.lengths() == kept


@pytest.mark.parametrize("way", WAYS)
def test_guesses_that_go_on_with_a_cache(way: str) -> None:
    """The library then feeds all tokens again, into any cache."""
    model, draft, tokens = small("llama"), small("llama", num_hidden_layers=1), repeating(16)
    for policy in (Full(), StreamingLLM(budget_tokens=8)):
        with policy(model) as active:
            text = model.generate(tokens, **SETTINGS)
            with pytest.raises(ValueError, match="holds 22 tokens of it"):
                model.generate(text, past_key_values=active.cache, **SETTINGS, **guessing(way, draft))


@pytest.mark.parametrize("name", POLICIES)
def test_a_shrunk_draft(name: str) -> None:
    policy, model = POLICIES[name], small("llama")
    # Close to the target, so that some guesses are right.
    draft = small("llama")
    tokens = repeating(20)
    wanted = model.generate(tokens, **SETTINGS)
    with policy(draft) as alone:
        draft.generate(tokens, **SETTINGS)
    with policy(draft) as active:
        torch.testing.assert_close(model.generate(tokens, assistant_model=draft, **SETTINGS), wanted)
    assert alone.cache is not None
    assert active.cache is not None
    most, given = (max(map(max, cache.lengths())) for cache in (alone.cache, active.cache))
    assert given <= most


@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv"])
def test_both_shrunk(name: str) -> None:
    policy, model, draft = POLICIES[name], small("llama"), small("llama")
    tokens = repeating(20)
    with policy(model):
        wanted = model.generate(tokens, **SETTINGS)
        with StreamingLLM(budget_tokens=6)(draft) as active:
            torch.testing.assert_close(model.generate(tokens, assistant_model=draft, **SETTINGS), wanted)
    assert active.cache is not None
    assert active.cache.lengths() == [[6, 6]] * 2


@pytest.mark.parametrize("way", ["lookup", "draft"])
@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv", "duo", "razor"])
def test_a_cache_made_beforehand(name: str, way: str) -> None:
    model, draft, tokens = small("llama"), small("llama", num_hidden_layers=1), repeating(16)
    caches = [POLICIES[name].make_cache(model) for _ in range(2)]
    wanted = model.generate(tokens, past_key_values=caches[0], **SETTINGS)
    given = model.generate(tokens, past_key_values=caches[1], **SETTINGS, **guessing(way, draft))
    torch.testing.assert_close(given, wanted)
    assert everything_held(caches[1]) == everything_held(caches[0])


def test_what_is_held_for_taking_back_is_counted() -> None:
    model, tokens = small("llama"), prompt(1, 30)
    cache = H2O(budget_tokens=8).make_cache(model)
    model(tokens[:, :20], past_key_values=cache)
    alone = cache.nbytes
    cache.activate_past_recording()
    model(tokens[:, 20:24], past_key_values=cache)
    assert cache.lengths() == [[8, 8]] * 2
    # How every layer stood, and four tokens: a key and a value for each head; their notes begin at zero again.
    assert cache.nbytes == 2 * alone + 4 * 2 * 2 * (8 + 8) * 4
    cache.crop(-3)
    assert cache.nbytes == alone
    assert cache.get_seq_length() == 21


@pytest.mark.parametrize("name", ["streaming", "h2o", "duo", "razor", "lococo", "expected", "quantised"])
def test_taking_back_leaves_no_trace(name: str) -> None:
    """Rows chosen and repeated meanwhile come along."""
    model, tokens = small("llama"), prompt(2, 30)
    plain, tried = (POLICIES[name].make_cache(model) for _ in range(2))
    order = torch.tensor([1, 0, 1])
    with torch.no_grad():
        for cache in (plain, tried):
            model(tokens[:, :20], past_key_values=cache)
        for i in range(20, 23):
            model(tokens[:, i : i + 1], past_key_values=plain)
        plain.batch_select_indices(order)
        tried.activate_past_recording()
        model(tokens[:, 20:27], past_key_values=tried)
        tried.batch_select_indices(order)
        tried.crop(-4)
        assert everything_held(tried) == everything_held(plain)
        given, wanted = (model(tokens[order, 23:24], past_key_values=cache).logits for cache in (tried, plain))
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
