"""A deep copy of a cache goes on by itself: a system prompt that is read once, and a copy of it for each user."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from recorder import held
from test_nothing_to_drop import SMALL
from test_template import RULE
from tiny_families import prompt, shallow
from torch import Tensor

from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM
from manyheads.shrink import H2O, Full, KVzip, MoA, Policy, Quantised, SnapKV, StreamingLLM, TidalDecode

SYSTEM, USERS = prompt(1, 24), [prompt(1, 6, seed=seed) for seed in (1, 2)]
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
CASES: list[Policy] = [
    *(cls(**own, budget_tokens=12) for cls, own in SMALL.items()),
    MoA(rule=(3, 0.2), sink_size=1),
    TidalDecode(budget_tokens=8, sparse_layer_start=0),
    H2O(budget_tokens=12, storage=Quantised(bits=8, residual=4)),
    SnapKV(budget_tokens=12, window_size=3, kernel_size=1, protect=RULE),
]


def read(model: Any, policy: Policy) -> Any:
    cache = policy.make_cache(model)
    with torch.no_grad():
        model(SYSTEM, past_key_values=cache)
    return cache


def told(model: Any, cache: Any, user: Tensor) -> tuple[Tensor, Any]:
    text = model.generate(torch.cat([SYSTEM, user], 1), past_key_values=cache, **SETTINGS)
    return text, [held(layer) for layer in cache.layers]


@pytest.mark.parametrize("policy", CASES, ids=lambda own: type(own).__name__)
def test_each_user_goes_on_alone(policy: Policy) -> None:
    model = shallow("llama")
    wanted = [told(model, read(model, policy), user) for user in USERS]
    first = read(model, policy)
    copies = [copy.deepcopy(first) for _ in USERS]
    del first
    gc.collect()
    for own, user, (text, kept) in zip(copies, USERS, wanted, strict=True):
        given = told(model, own, user)
        torch.testing.assert_close(given[0], text)
        assert given[1] == kept
        assert own.policy is policy


def test_a_copy_of_an_empty_cache_is_shrunk_too() -> None:
    model = shallow("llama")
    policy = KVzip(budget_tokens=8, sink_size=2)
    empty = policy.make_cache(model)
    own = copy.deepcopy(empty)
    with torch.no_grad():
        model(SYSTEM, past_key_values=own)
    assert own.lengths() == read(model, policy).lengths()
    assert empty.get_seq_length() == 0


def test_a_copy_in_the_midst_of_a_context() -> None:
    model = shallow("llama")
    policy = KVzip(budget_tokens=8, sink_size=2)
    cache = policy.make_cache(model)
    cache.expect(24)
    with torch.no_grad():
        model(SYSTEM[:, :10], past_key_values=cache)
        own = copy.deepcopy(cache)
        for each in (cache, own):
            model(SYSTEM[:, 10:], past_key_values=each)
    assert [held(layer) for layer in own.layers] == [held(layer) for layer in cache.layers]
    assert max(map(max, own.lengths())) < 24


def test_guesses_on_a_copy() -> None:
    """What a call says of its guesses is said to the copy, not to the cache that it was copied from."""
    model, text = shallow("llama"), prompt(1, 5).repeat(1, 4)
    policy = H2O(budget_tokens=8)
    wanted = model.generate(text, past_key_values=policy.make_cache(model), **SETTINGS)
    own = copy.deepcopy(policy.make_cache(model))
    given = model.generate(text, past_key_values=own, prompt_lookup_num_tokens=3, **SETTINGS)
    torch.testing.assert_close(given, wanted)


def test_weights_are_not_copied_with_a_cache() -> None:
    config = ManyheadsConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = ManyheadsForCausalLM(config).eval()
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[1, :4] = 0
    cache = StreamingLLM(budget_tokens=8, positions="text").make_cache(model)
    with torch.no_grad():
        model(prompt(2, 12), attention_mask=padding, past_key_values=cache)
        own = copy.deepcopy(cache)
        assert own._lent.stack is cache._lent.stack
        padding = torch.cat([padding, padding[:, -1:]], 1)
        given, wanted = (
            model(prompt(2, 1), attention_mask=padding, past_key_values=each).logits for each in (own, cache)
        )
    torch.testing.assert_close(given, wanted)


def test_what_is_no_copy_is_refused() -> None:
    cache = read(shallow("llama"), Full())
    for way in (lambda own: torch.save(own, io.BytesIO()), copy.copy):
        with pytest.raises(TypeError, match=r"copy\.deepcopy\(cache\)"):
            way(cache)
