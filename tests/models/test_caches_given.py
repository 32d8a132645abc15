"""Caches that callers bring along, and those that a pass cannot have: read, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import causal_lm, seq2seq, tokens
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig

from manyheads.models import ManyheadsCache

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
KINDS = ["softmax", "mla", "mswa", "based", "titans", "mega", "hyena", "mosa"]


def checkpointed(model: Any) -> Any:
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable()
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_cache_that_is_given_is_read_whatever_is_given_back(name: str) -> None:
    """As by transformers' models, whose use_cache=False says no more than that none is returned."""
    model, ids = causal_lm(name, short_conv=2), tokens(2, 9)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    out = model(ids[:, 5:], past_key_values=cache, use_cache=False)
    assert_close(out.logits, model(ids).logits[:, 5:])
    assert out.past_key_values is None
    assert cache.get_seq_length() == 9


@torch.no_grad()
def test_so_are_transformers_own_and_a_decoders() -> None:
    model, ids, cache = causal_lm("gqa"), tokens(2, 9), DynamicCache()
    model(ids[:, :5], past_key_values=cache, use_cache=False)
    assert_close(model(ids[:, 5:], past_key_values=cache, use_cache=False).logits, model(ids).logits[:, 5:])
    both = seq2seq("softmax")
    cache = both(ids, decoder_input_ids=ids[:, :5], use_cache=True).past_key_values
    out = both(ids, decoder_input_ids=ids[:, 5:], past_key_values=cache, use_cache=False)
    assert_close(out.logits, both(ids, decoder_input_ids=ids).logits[:, 5:])
    assert out.past_key_values is None


def test_generate_without_a_cache_refuses_one_that_has_seen_tokens() -> None:
    model, ids = causal_lm("softmax"), tokens(2, 9)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False, and past_key_values has seen 5 tokens"):
        model.generate(ids, past_key_values=cache, use_cache=False, **GREEDY)
    empty = model.generate(ids, past_key_values=ManyheadsCache(2), use_cache=False, **GREEDY)
    assert empty.equal(model.generate(ids, **GREEDY))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", KINDS)
def test_generate_in_training_with_checkpointed_layers_is_that_without(name: str) -> None:
    """transformers takes the cache from such layers: a step that relied on it would see its own token alone."""
    model, ids = causal_lm(name, short_conv=2), tokens(2, 6)
    training = model.train().generate(ids, use_cache=False, **GREEDY)
    assert checkpointed(model).generate(ids, **GREEDY).equal(training)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_layers_read_no_cache_and_give_none() -> None:
    plain, ids = causal_lm("softmax"), tokens(2, 6)
    model, cache = checkpointed(plain), plain(ids, use_cache=True).past_key_values
    assert model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match=r"has seen 6 tokens, and checkpointed layers read no states.*eval"):
        model(ids, past_key_values=cache)
    assert model.eval()(ids, past_key_values=cache).past_key_values is cache


def test_embeddings_are_not_dropped_where_there_is_no_cache() -> None:
    """based gives no weights with a state, so that these are asked for without one."""
    model, ids = causal_lm("based"), tokens(2, 6)
    embeds = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, **GREEDY).equal(model.generate(ids, **GREEDY)[:, 6:])
    with pytest.raises(ValueError, match=r"layer 0, based.*inputs_embeds are passed once"):
        model.generate(inputs_embeds=embeds, output_attentions=True, return_dict_in_generate=True, **GREEDY)


def test_pages_of_keys_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="continuous batching"):
        causal_lm("softmax").generate_batch([[3, 4, 5]], generation_config=GenerationConfig(**GREEDY))
