"""With nothing dropped the ragged cache is the dense cache: in every family, in every way of generating."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, prompt, shallow
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from manyheads.shrink import H2O, Full, KeyNorm, Policy, SnapKV, StreamingLLM, release

NEW = 5
# Ways that a full budget may be said: nothing dropped, or a budget that is never reached.
COVERING: list[Policy] = [
    Full(),
    StreamingLLM(budget_tokens=64),
    H2O(budget_tokens=64),
    KeyNorm(compression_ratio=0.0),
    SnapKV(budget_tokens=64, window_size=4),
]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunked": {"prefill_chunk_size": 5},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def generate(model: PreTrainedModel, tokens: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, **settings}
    out = model.generate(tokens, return_dict_in_generate=True, output_logits=True, pad_token_id=0, **settings)
    return out.sequences, torch.stack(out.logits) if out.logits[0].dim() == 2 else torch.cat(out.logits)


def repeating(rows: int, length: int) -> Tensor:
    """A text in which n-gram lookup finds something."""
    return prompt(rows, 5).repeat(1, length // 5 + 1)[:, :length]


def same(given: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(given[0], wanted[0])
    torch.testing.assert_close(given[1], wanted[1], atol=1e-5, rtol=1e-5)


# Draws are made of logits, whatever family they come from.
DRAWN = [(family, mode) for family in FAMILIES for mode in MODES if mode != "sampling" or family in ("llama", "gpt2")]


@pytest.mark.parametrize(("family", "mode"), DRAWN)
def test_generate_equals_the_dense_cache(family: str, mode: str) -> None:
    model = shallow(family)
    tokens = repeating(1 if mode == "lookup" else 2, 12)
    wanted = generate(model, tokens, **MODES[mode])
    cache = Full().make_cache(model)
    same(generate(model, tokens, past_key_values=cache, **MODES[mode]), wanted)
    assert cache.get_seq_length() == wanted[0].shape[1] - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_chunks_and_a_second_turn(family: str) -> None:
    model = shallow(family)
    tokens, padding = prompt(3, 24), torch.ones(3, 24, dtype=torch.long)
    padding[1, :6], padding[2, :1] = 0, 0
    wanted = turns(model, tokens, padding, DynamicCache(config=model.config))
    given = turns(model, tokens, padding, Full().make_cache(model))
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


def turns(model: PreTrainedModel, tokens: Tensor, padding: Tensor, cache: Any) -> Tensor:
    """Logits at real tokens: prompt, two tokens, a second turn in two chunks, one token more."""
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    logits, start = [], 0
    for end in (11, 12, 13, 19, 23, 24):
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


@cache
def dense(family: str) -> tuple[PreTrainedModel, Tensor, Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """A model, a batch with a row that is padded on the left, and what the dense cache says of it; and its texts."""
    model = shallow(family)
    tokens, padding = prompt(2, 24), torch.ones(2, 24, dtype=torch.long)
    padding[1, :6] = 0
    wanted = turns(model, tokens, padding, DynamicCache(config=model.config))
    texts = {mode: generate(model, repeating(1, 12), **MODES[mode]) for mode in ("beams", "lookup")}
    return model, tokens, padding, wanted, texts


@pytest.mark.parametrize("policy", COVERING, ids=lambda own: type(own).__name__)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_a_budget_that_covers_everything(family: str, policy: Policy) -> None:
    model, tokens, padding, wanted, texts = dense(family)
    torch.testing.assert_close(turns(model, tokens, padding, policy.make_cache(model)), wanted, atol=1e-5, rtol=1e-5)
    for mode, text in texts.items():
        release(model)
        same(generate(model, repeating(1, 12), past_key_values=policy.make_cache(model), **MODES[mode]), text)
    release(model)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_assisted_decoding(family: str) -> None:
    model, assistant = shallow(family), shallow(family, num_hidden_layers=1, layer_types=None)
    tokens = prompt(1, 11)
    wanted = generate(model, tokens, assistant_model=assistant)
    with Full()(model) as active:
        same(generate(model, tokens, assistant_model=assistant), wanted)
    assert active.cache is not None
    assert active.cache.get_seq_length() == wanted[0].shape[1] - 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_goes_on_with_its_cache(family: str) -> None:
    model = shallow(family)
    first, more = prompt(2, 9), prompt(2, 4, seed=1)

    def talk(cache: Any) -> tuple[Tensor, Tensor]:
        text, _ = generate(model, first, past_key_values=cache)
        return generate(model, torch.cat([text, more], 1), past_key_values=cache)

    wanted = talk(DynamicCache(config=model.config))
    same(talk(Full().make_cache(model)), wanted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_inside_the_block_and_after(attention: str) -> None:
    model = shallow("llama")
    model.set_attn_implementation(attention)
    config, tokens = model.config, prompt(2, 9)
    wanted = generate(model, tokens)
    with Full()(model) as active:
        same(generate(model, tokens), wanted)
        first = active.cache
        assert first is not None
        assert first.nbytes > 0
        direct = model(tokens).past_key_values
        assert direct is active.cache
        assert direct is not first
        torch.testing.assert_close(model(tokens, use_cache=False).logits, model(tokens).logits)
    assert model.config is config
    assert model.config._attn_implementation == attention
    assert "generate" not in vars(model)
    assert isinstance(model(tokens).past_key_values, DynamicCache)
    same(generate(model, tokens), wanted)


def test_the_model_comes_back_after_an_error() -> None:
    model = shallow("llama")
    config = model.config
    with pytest.raises(RuntimeError, match="mine"), Full()(model):
        raise RuntimeError("mine")
    assert model.config is config
    assert not model._forward_pre_hooks


def test_a_shared_config_is_left_alone() -> None:
    model = shallow("llama")
    other = type(model)(model.config)
    Full().make_cache(model)
    assert other.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_an_attached_model_without_our_cache(family: str) -> None:
    model = shallow(family)
    tokens, padding = prompt(2, 12), torch.ones(2, 12, dtype=torch.long)
    padding[1, :4] = 0

    def passes() -> list[Tensor]:
        real = padding.bool()
        return [
            model(tokens, attention_mask=padding, use_cache=False).logits[real],
            model(tokens, attention_mask=padding, past_key_values=DynamicCache(config=model.config)).logits[real],
            model(tokens, use_cache=False).logits,
        ]

    wanted = passes()
    Full().make_cache(model)
    torch.testing.assert_close(passes(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = shallow("llama").to(dtype)
    model.set_attn_implementation("sdpa")
    tokens, padding = prompt(3, 24), torch.ones(3, 24, dtype=torch.long)
    padding[1, :6] = 0
    wanted = turns(model, tokens, padding, DynamicCache(config=model.config))
    given = turns(model, tokens, padding, Full().make_cache(model))
    close = 1e-9 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(given, wanted, atol=close, rtol=close)
    shrunk = turns(model, tokens, padding, H2O(budget_tokens=8).make_cache(model))
    assert bool(shrunk.isfinite().all())
    assert shrunk.dtype == dtype


def test_a_mask_of_the_callers_own() -> None:
    model = shallow("llama")
    tokens = prompt(2, 10)
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    mask[:, :, 5:, 2] = False
    added = torch.zeros(2, 1, 10, 10).masked_fill(~mask, torch.finfo(torch.float32).min)
    wanted = model(tokens, attention_mask=added, use_cache=False).logits
    for own in (mask, added):
        cache = Full().make_cache(model)
        given = model(tokens, attention_mask=own, past_key_values=cache).logits
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"does not cover 2 queries on 12 tokens seen"):
        model(tokens[:, :2], attention_mask=mask, past_key_values=cache)


def test_blocks_within_blocks() -> None:
    model = shallow("llama")
    config, tokens = model.config, prompt(1, 10)
    with Full()(model) as outer:
        with (
            pytest.raises(ValueError, match=r"StreamingLLM: the model is inside a block of Full already"),
            StreamingLLM(budget_tokens=6)(model),
        ):
            raise AssertionError("the inner block began")
        generate(model, tokens)
    assert outer.cache is not None
    assert outer.cache.lengths() == [[9 + NEW] * 2] * 2
    with StreamingLLM(budget_tokens=6)(model) as after:
        generate(model, tokens)
    assert after.cache is not None
    assert after.cache.lengths() == [[6, 6]] * 2
    assert model.config is config


def test_training_is_as_before() -> None:
    model = shallow("llama").train()
    tokens = prompt(2, 10)
    wanted = torch.autograd.grad(model(tokens, labels=tokens).loss, model.lm_head.weight)[0]
    Full().make_cache(model)
    given = torch.autograd.grad(model(tokens, labels=tokens).loss, model.lm_head.weight)[0]
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
