"""After a policy the model is as it was, and as its user made it meanwhile: modes, configs, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_families import prompt, shallow
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from manyheads.hosts.taps import record
from manyheads.shrink import Full, LoCoCo, QFilters, StreamingLLM, fit_lococo, fit_q_filters, release

SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}


def modes(model: Any) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("what", ["probe", "filters", "lococo"])
def test_parts_that_train_by_themselves_still_do(what: str, training: bool) -> None:
    model = shallow("llama").train(training)
    if what == "probe":
        config = AutoConfig.for_model(
            "granite", **{k: v for k, v in model.config.to_dict().items() if k != "model_type"}
        )
        model = AutoModelForCausalLM.from_config(config).train(training)
    model.model.layers[0].train(not training)
    before = modes(model)
    if what == "probe":
        Full().check(model)
    elif what == "filters":
        assert QFilters(filters=fit_q_filters(model, prompt(1, 12))).table.shape == (2, 2, 8)
    else:
        fit_lococo(model, prompt(4, 16), LoCoCo(budget_tokens=6, mem_compress=2, recent_size=2), prefix=10, epochs=1)
    assert modes(model) == before


def block(model: Any) -> Any:
    return StreamingLLM(budget_tokens=8)(model)


@pytest.mark.parametrize("way", [block, record], ids=["policy", "taps"])
def test_a_vocabulary_that_grew_meanwhile(way: Any) -> None:
    model = shallow("llama")
    config, other = model.config, shallow("llama")
    attention = config._attn_implementation
    with way(model):
        model.resize_token_embeddings(70)
        model.config.pad_token_id = 5
    assert model.config is config
    assert (config.vocab_size, config.pad_token_id, config._attn_implementation) == (70, 5, attention)
    again = type(model)(config)
    again.load_state_dict(model.state_dict())
    assert other.config.vocab_size == 61


def test_a_config_within_a_config() -> None:
    text = shallow("llama").config.to_dict()
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=60)
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(config).eval()
    inner = config.text_config
    with Full()(model):
        model.config.text_config.pad_token_id = 9
    assert model.config is config
    assert config.text_config is inner
    assert inner.pad_token_id == 9
    assert inner._attn_implementation != "manyheads_ragged"


def test_a_copy_of_an_attached_model_is_released_by_itself() -> None:
    model, tokens = shallow("llama"), prompt(1, 12)
    Full().make_cache(model)
    other = copy.deepcopy(model)
    release(other)
    assert other.config._attn_implementation == "eager"
    assert not other._forward_pre_hooks
    assert not other._forward_pre_hooks_with_kwargs
    assert model.config._attn_implementation == "manyheads_ragged"
    assert model.config is not other.config
    cache = StreamingLLM(budget_tokens=8).make_cache(model)
    model.generate(tokens, past_key_values=cache, **SETTINGS)
    assert cache.lengths() == [[8, 8]] * 2
    assert isinstance(other(tokens).past_key_values, DynamicCache)


def test_no_copy_within_a_block() -> None:
    """Its generate was the first model's, with the first model's weights."""
    model = shallow("llama")
    with block(model), pytest.raises(ValueError, match="copy it before the block, or after"):
        copy.deepcopy(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    tokens = prompt(1, 6)
    assert bool((other.generate(tokens, **SETTINGS) != model.generate(tokens, **SETTINGS)).any())
