"""Whatever generate is told, and wherever: with nothing dropped the dense cache's text, all tokens held, or an error.

A setting comes as a keyword, in a generation_config that the call is given, or in the model's own.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, prompt, shallow
from torch import Tensor
from transformers import CompileConfig, DynamicCache, GenerationConfig, PreTrainedModel

from manyheads.cache_names import CACHE_NAME
from manyheads.shrink import H2O, TOVA, Full, KeyNorm, Policy, SnapKV, StreamingLLM

NEW = 6
COVERING: list[Policy] = [
    Full(),
    StreamingLLM(budget_tokens=64),
    H2O(compression_ratio=0.0),
    KeyNorm(budget_bytes=10**6),
    SnapKV(budget_tokens=64, window_size=4),
]
BASE: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
WAYS = ("keyword", "object", "model")
HONOURED: dict[str, dict[str, Any]] = {
    "use_cache=True": {"use_cache": True},
    "prefill_chunk_size": {"prefill_chunk_size": 5},
    "disable_compile": {"disable_compile": True},
    "num_beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "guidance_scale": {"guidance_scale": 1.5},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
}
ONE_ROW = ("lookup", "early exit")


def text(model: PreTrainedModel, tokens: Tensor, way: str, settings: dict[str, Any], **given: Any) -> Tensor:
    """The generated tokens; the model's own config is put back."""
    torch.manual_seed(3)
    before = model.generation_config
    try:
        if way == "model":
            model.generation_config = GenerationConfig(**{**BASE, **settings})
            return model.generate(tokens, **given)
        if way == "object":
            return model.generate(tokens, generation_config=GenerationConfig(**{**BASE, **settings}), **given)
        return model.generate(tokens, **{**BASE, **settings, **given})
    finally:
        model.generation_config = before


def prompt_for(name: str) -> Tensor:
    return prompt(1, 5).repeat(1, 3)[:, :12] if name in ONE_ROW else prompt(2, 12)


# transformers 5.16 itself exits early within an early exit, endlessly, where the model's own config says so.
SAID = [(name, way) for name in HONOURED for way in WAYS if (name, way) != ("early exit", "model")]


@pytest.mark.parametrize(("name", "way"), SAID)
def test_what_is_honoured(name: str, way: str) -> None:
    model, tokens = shallow("llama"), prompt_for(name)
    wanted = text(model, tokens, way, HONOURED[name])
    # How a setting was said is nothing to a policy: each in every way, all where it is a keyword.
    for policy in COVERING if way == "keyword" else (Full(), H2O(compression_ratio=0.0)):
        with policy(model) as active:
            torch.testing.assert_close(text(model, tokens, way, HONOURED[name]), wanted)
        assert active.cache is not None
        assert active.cache.lengths() == [[wanted.shape[1] - 1] * 2] * 2


@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "lookup"]
)
@pytest.mark.parametrize("way", ["object", "model", "config.json"])
def test_a_config_that_says_no_cache(way: str, mode: dict[str, Any]) -> None:
    model, tokens = shallow("llama"), prompt(1, 5).repeat(1, 3)[:, :12]
    wanted = text(model, tokens, way, mode)
    if way == "config.json":
        # As from_pretrained reads such a checkpoint.
        model.config.use_cache = False
        model.generation_config = GenerationConfig.from_model_config(model.config)
    for policy in COVERING if way == "object" else (Full(), H2O(compression_ratio=0.0)):
        with policy(model) as active:
            torch.testing.assert_close(
                text(model, tokens, way, {"use_cache": False, **mode} if way != "config.json" else mode), wanted
            )
        assert active.cache is not None
        assert active.cache.lengths() == [[wanted.shape[1] - 1] * 2] * 2
    with StreamingLLM(budget_tokens=6)(model) as active:
        text(model, tokens, way, {"use_cache": False} if way != "config.json" else {})
    assert active.cache is not None
    assert active.cache.lengths() == [[6, 6]] * 2


def test_a_callers_config_is_left_as_it_was() -> None:
    model, own = shallow("llama"), GenerationConfig(**BASE, use_cache=False)
    before = copy.deepcopy(own).to_dict()
    with Full()(model):
        model.generate(prompt(1, 6), generation_config=own)
    assert own.to_dict() == before
    assert model.generation_config.use_cache is not False


def test_a_call_that_says_no_cache() -> None:
    model, tokens = shallow("llama"), prompt(2, 12)
    wanted = text(model, tokens, "keyword", {})
    with TOVA(budget_tokens=4)(model) as active:
        torch.testing.assert_close(text(model, tokens, "keyword", {"use_cache": False}), wanted)
        assert active.cache is None
        cache = model(tokens).past_key_values
        with pytest.raises(ValueError, match="caches nothing"):
            text(model, tokens, "keyword", {"use_cache": False}, past_key_values=cache)


REFUSED: dict[str, Any] = {
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "max_cache_len": 32,
    "compile_config": CompileConfig(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_another_cache_is_refused_by_name(name: str, way: str) -> None:
    model = shallow("llama")
    with Full()(model), pytest.raises(ValueError, match=rf"{name}=.* leave it out of the call"):
        text(model, prompt(1, 6), way, {name: REFUSED[name]})


@pytest.mark.parametrize("implementation", ["dynamic", "offloaded", "offloaded_static", "quantized", "paged"])
def test_every_implementation_is_refused(implementation: str) -> None:
    model = shallow("llama")
    with Full()(model), pytest.raises(ValueError, match=f"cache_implementation='{implementation}'"):
        text(model, prompt(1, 6), "keyword", {"cache_implementation": implementation})


def test_every_field_about_a_cache_is_decided() -> None:
    """A release of transformers that adds one is noticed."""
    fields = {
        name for name in vars(GenerationConfig()) if any(word in name for word in ("cache", "compile", "batching"))
    }
    assert fields <= {*REFUSED, "use_cache", "disable_compile", "continuous_batching_config"}


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(name: str) -> None:
    model = shallow("llama")
    with Full()(model), pytest.raises(ValueError, match=f"{name} batches continuously"):
        getattr(model, name)([[3, 4]])
    assert name not in vars(model)


def own_loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """A caller's own decoding, handed to generate."""
    cache = kwargs[CACHE_NAME]
    for _ in range(NEW):
        logits = model(input_ids[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
    return input_ids


def test_a_decoding_loop_of_the_callers_own() -> None:
    model, tokens = shallow("llama"), prompt(2, 12)
    wanted = text(model, tokens, "keyword", {}, custom_generate=own_loop)
    torch.testing.assert_close(wanted, text(model, tokens, "keyword", {}))
    with Full()(model) as active:
        torch.testing.assert_close(text(model, tokens, "keyword", {}, custom_generate=own_loop), wanted)
    assert active.cache is not None
    assert active.cache.lengths() == [[11 + NEW] * 2] * 2


def test_arguments_by_place() -> None:
    model, tokens = shallow("llama"), prompt(2, 12)
    own = GenerationConfig(**BASE)
    wanted = model.generate(tokens, own)
    logits = model(tokens).logits
    with Full()(model) as active:
        torch.testing.assert_close(model.generate(tokens, own), wanted)
        cache = model(tokens[:, :8]).past_key_values
        given = model(tokens[:, 8:], None, None, cache).logits
        torch.testing.assert_close(given, logits[:, 8:], atol=1e-5, rtol=1e-5)
        assert active.cache is cache
        with pytest.raises(ValueError, match="DynamicCache, which Full cannot shrink"):
            model(tokens, None, None, DynamicCache(config=model.config))
        with pytest.raises(TypeError):
            model(tokens, input_ids=tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_below_its_head_too(family: str) -> None:
    model, tokens = shallow(family), prompt(2, 12)
    wanted = model.base_model(tokens).last_hidden_state
    with TOVA(budget_tokens=4)(model) as active:
        out = model.base_model(tokens)
        assert out.past_key_values is active.cache
    torch.testing.assert_close(out.last_hidden_state, wanted, atol=1e-5, rtol=1e-5)
    assert active.cache is not None
    assert {length for own in active.cache.lengths() for length in own} == {4}
    assert not model.base_model._forward_pre_hooks


NAMES = ("activation", "gradient")
# What a call says of caches is one code for all families: there each has what their own configs say.
CALLS = [("llama", said) for said in (False, None, True)] + [(family, None) for family in ("gemma2", "gpt2", "gpt_oss")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "use_cache"), CALLS)
def test_forward(family: str, use_cache: bool | None, checkpointing: bool, training: bool) -> None:
    quiet = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if family == "gpt2" else {}
    model, tokens = shallow(family, **quiet), prompt(2, 12)
    if checkpointing:
        # Its name before transformers 5.20 and after.
        next(
            getattr(model, f"{own}_checkpointing_enable")
            for own in NAMES
            if hasattr(model, f"{own}_checkpointing_enable")
        )()
    model.train(training)

    def step() -> tuple[Any, Tensor, Tensor]:
        out = model(tokens, labels=tokens, use_cache=use_cache)
        return out.past_key_values, out.logits, torch.autograd.grad(out.loss, model.get_input_embeddings().weight)[0]

    cache, *wanted = step()
    with Full()(model) as active:
        ours, *given = step()
        if checkpointing and training:
            with pytest.raises(ValueError, match="caches nothing"):
                model(tokens, past_key_values=Full().make_cache(model))
            with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
                model.generate(tokens)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)
    assert (ours is None) == (cache is None)
    assert (active.cache is None) == (ours is None)
    if ours is not None:
        assert ours.lengths()[1] == [12] * len(ours.lengths()[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_its_own_beside_a_config_that_says_no_cache(family: str) -> None:
    """Outside a policy's block generate feeds every token anew for every token, into the cache that it is given."""
    model, tokens = shallow(family), prompt(2, 12)
    cache = Full().make_cache(model)
    with pytest.raises(ValueError, match="call with use_cache=False, and is fed again"):
        text(model, tokens, "model", {"use_cache": False}, past_key_values=cache)
    cache.reset()
    assert text(model, tokens, "model", {}, past_key_values=cache).shape[1] == 12 + NEW
