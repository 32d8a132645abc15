"""Calls that a shrunk cache meets over its life: other modes, other types, other batches, and some that broke off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorder import held
from test_cache_copies import CASES, SETTINGS, SYSTEM
from test_template import RULE
from tiny_families import prompt, shallow
from torch import Tensor
from transformers import DynamicCache

from manyheads.shrink import H2O, Full, Policy, Quantised, SnapKV, StreamingLLM, release

MORE = prompt(1, 6, seed=4)


def talk(model: Any, cache: Any, first: Any) -> tuple[Tensor, Any]:
    """A prompt and a token within `first`, then a second turn by generate, which has no gradients by itself."""
    with first:
        model(SYSTEM, past_key_values=cache)
        model(MORE[:, :1], past_key_values=cache)
        cache.batch_repeat_interleave(2)
    text = model.generate(torch.cat([SYSTEM, MORE], 1), past_key_values=cache, num_beams=2, **SETTINGS)
    return text, [held(layer) for layer in cache.layers]


@pytest.mark.parametrize("policy", CASES, ids=lambda own: type(own).__name__)
def test_what_inference_mode_made_goes_on_outside(policy: Policy) -> None:
    model = shallow("llama")
    caches = [policy.make_cache(model) for _ in range(2)]
    wanted = talk(model, caches[0], torch.no_grad())
    given = talk(model, caches[1], torch.inference_mode())
    torch.testing.assert_close(given[0], wanted[0])
    assert given[1] == wanted[1]


def test_rows_chosen_and_guesses_taken_back_in_inference_mode() -> None:
    model = shallow("llama")
    logits = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = H2O(budget_tokens=8).make_cache(model)
        with mode():
            model(SYSTEM.repeat(2, 1), past_key_values=cache)
            cache.batch_select_indices(torch.tensor([0]))
            cache.activate_past_recording()
            model(MORE, past_key_values=cache)
            cache.crop(-3)
        with torch.no_grad():
            logits.append(model(MORE[:, 3:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("policy", [Full(), StreamingLLM(budget_tokens=64), Full(storage=Quantised(bits=8))], ids=repr)
def test_a_wider_type_is_not_made_narrow(policy: Policy) -> None:
    """A prompt under autocast, and what follows without: the dense cache then holds what is wide enough for both."""
    model = shallow("llama")

    def follow(cache: Any) -> Tensor:
        with torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(SYSTEM, past_key_values=cache)
            return model(MORE, past_key_values=cache).logits

    wanted = follow(DynamicCache(config=model.config))
    given = follow(policy.make_cache(model))
    close = 5e-2 if policy.storage is not None else 2e-2
    torch.testing.assert_close(given, wanted, atol=close, rtol=close)


def test_codes_under_autocast() -> None:
    model = shallow("llama")
    policy = H2O(budget_tokens=12, storage=Quantised(bits=8, residual=4))
    with torch.autocast("cpu", dtype=torch.bfloat16), policy(model) as active:
        assert model.generate(SYSTEM, **SETTINGS).shape[1] == 28
        assert active.cache is not None
        assert active.cache.lengths() == [[12, 12]] * 2


@pytest.mark.parametrize("rows", [(4, 1), (1, 4)])
@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_rows_is_refused(rows: tuple[int, int], count: int) -> None:
    model = shallow("llama")
    cache = StreamingLLM(budget_tokens=8).make_cache(model)
    model(SYSTEM.repeat(rows[0], 1), past_key_values=cache)
    with pytest.raises(ValueError, match=rf"holds {rows[0]} rows?, and the call has {rows[1]}.*repeat_inter"):
        model(prompt(rows[1], count), past_key_values=cache)
    cache.batch_select_indices(torch.zeros(rows[1], dtype=torch.long))
    assert model(prompt(rows[1], count), past_key_values=cache).logits.shape[0] == rows[1]


def test_sequences_of_one_cache() -> None:
    model = shallow("llama")
    cache = Full().make_cache(model)
    model(SYSTEM, past_key_values=cache)
    text = torch.cat([SYSTEM, MORE], 1)
    with pytest.raises(ValueError, match="holds 1 row, and the call has 3"):
        model.generate(text, past_key_values=cache, num_return_sequences=3, **SETTINGS | {"do_sample": True})


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_broke_off(error: type[BaseException]) -> None:
    """Some layers have its tokens and others not: what follows would be read at two places at once."""
    model = shallow("llama")
    cache = StreamingLLM(budget_tokens=8).make_cache(model)

    def stop(*args: Any) -> None:
        raise error("stop")

    model(SYSTEM, past_key_values=cache)
    hook = model.model.layers[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(MORE[:, :1], past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match=r"broke off.* seen 25 and others 24 tokens"):
        model(MORE[:, :1], past_key_values=cache)
    cache.reset()
    model(SYSTEM, past_key_values=cache)


def test_a_cache_of_another_model_is_refused() -> None:
    one, other = shallow("llama"), shallow("llama")
    Full().make_cache(other)
    with pytest.raises(ValueError, match="made for another LlamaForCausalLM"):
        other(SYSTEM, past_key_values=Full().make_cache(one))


@pytest.mark.parametrize("where", ["call", "config"])
def test_weights_that_are_not_made_are_refused(where: str) -> None:
    model = shallow("llama")
    said: dict[str, Any] = {"output_attentions": True} if where == "call" else {}
    model.config.output_attentions = where == "config"
    assert model(SYSTEM, **said).attentions[0].shape == (1, 4, 24, 24)
    with Full()(model):
        for call, settings in ((model, {}), (model.generate, SETTINGS)):
            with pytest.raises(ValueError, match=r"output_attentions=True.*outside"):
                call(SYSTEM, **settings, **said)
    cache = Full().make_cache(model)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(SYSTEM, past_key_values=cache, **said)
    release(model)
    assert len(model(SYSTEM, **said).attentions) == 2


def test_protected_tokens_in_calls_that_are_given_no_cache() -> None:
    model, tokens = shallow("llama"), prompt(2, 24)
    policy = SnapKV(budget_tokens=16, window_size=3, kernel_size=1, protect=RULE)
    cache = policy.make_cache(model)
    model(tokens, past_key_values=cache)
    with policy(model) as active:
        model(tokens)
        assert active.cache is not None
        assert [held(layer) for layer in active.cache.layers] == [held(layer) for layer in cache.layers]


@pytest.mark.parametrize("first", [SYSTEM, SYSTEM[:, :1]], ids=["prompt", "token"])
def test_gradients_that_would_be_wrong_are_refused(first: Tensor) -> None:
    """What is held carries none, the keys of a later pass included: k_proj and v_proj would learn nothing from it."""
    model = shallow("llama")
    cache = Full().make_cache(model)
    model(first, past_key_values=cache)
    out = model(MORE, past_key_values=cache)
    with pytest.raises(ValueError, match=r"no gradient.*use_cache=False"):
        out.logits.sum().backward()
    release(model)
    model(MORE, past_key_values=DynamicCache(config=model.config)).logits.sum().backward()
