"""Places in what was fed, whatever cache a model generates with: a window's forgets, a static one is longer than the
text; and layers whose sinks take a share of the softmax beside the keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch import Tensor
from torch.testing import assert_close

from manyheads.convert import latent
from manyheads.hosts.taps import record, sites
from manyheads.steer import boost
from manyheads.steer.group_attention import group_attention

WINDOWED = ["mistral", "gemma3_text", "gpt_oss"]
CACHES = [None, "static"]


def generated(model: Any, ids: Tensor, padding: Tensor, cache: str | None) -> Any:
    return model.generate(
        ids,
        attention_mask=padding,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )


def whole_pass(model: Any, made: Any, padding: Tensor) -> Any:
    """All that was fed, in one pass without a cache."""
    fed = made.sequences[:, :-1]
    padding = torch.nn.functional.pad(padding, (0, fed.shape[1] - padding.shape[1]), value=1)
    places = (padding.cumsum(1) - 1).clamp_min(0)
    return model(fed, attention_mask=padding, position_ids=places, use_cache=False)


def padded(rows: int, length: int) -> Tensor:
    padding = torch.ones(rows, length, dtype=torch.long)
    padding[1:, :2] = 0
    return padding


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", [*WINDOWED, "llama"])
@torch.no_grad()
def test_calls_while_generating_tell_of_all_that_was_fed(name: str, cache: str | None) -> None:
    """Looked at in the end, when a static cache was written over and emptied."""
    model, ids, padding = tiny(name), prompt(2, 12), padded(2, 12)
    with record(model) as calls:
        made = generated(model, ids, padding, cache)
    if cache:
        made.past_key_values.reset()
    with record(model) as wanted:
        whole_pass(model, made, padding)
    layers = len(sites(model))
    for step in range(1, 6):
        for own, whole in zip(calls[step * layers : (step + 1) * layers], wanted, strict=True):
            m = 12 + step
            assert own.key.shape[2] == own.value.shape[2] == m
            assert_close(own.weights(), whole.weights(rows=slice(m - 1, m))[..., :m], atol=2e-5, rtol=0)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", [*WINDOWED, "llama"])
@torch.no_grad()
def test_a_span_is_where_it_was_fed_while_generating(name: str, cache: str | None) -> None:
    model, ids, padding = tiny(name), prompt(2, 12), padded(2, 12)
    with boost(model, slice(8, 11), 6.0):
        made = generated(model, ids, padding, cache)
        wanted = whole_pass(model, made, padding).logits[:, 11:]
    assert_close(torch.stack(made.logits, 1), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*WINDOWED, "llama"])
@torch.no_grad()
def test_a_prompt_without_padding_in_a_static_cache(name: str) -> None:
    """The mask is left out then, and the queries are not the buffer's last."""
    model, ids = tiny(name), prompt(1, 12)
    model.set_attn_implementation("eager" if name == "gpt_oss" else "sdpa")
    wanted = generated(model, ids, torch.ones_like(ids), "static")
    with record(model):
        given = generated(model, ids, torch.ones_like(ids), "static")
    assert_close(torch.stack(given.logits), torch.stack(wanted.logits), atol=1e-4, rtol=1e-4)


def with_log(ids: Tensor, columns: slice, factor: float, first: int = 0) -> Tensor:
    """A mask for eager attention that adds log factor to keys, for queries from `first` on."""
    n = ids.shape[1]
    mask = torch.zeros(1, 1, n, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), torch.finfo(torch.float).min)
    mask[..., first:, columns] += math.log(factor) if factor else torch.finfo(torch.float).min
    return mask.clamp_min(torch.finfo(torch.float).min)


@pytest.mark.parametrize("factor", [1.001, 5.0, 0.0])
@torch.no_grad()
def test_a_boost_beside_sinks_is_the_log_added_to_the_scores(factor: float) -> None:
    model, ids = tiny("gpt_oss", layer_types=["full_attention"] * 3), prompt(2, 12)
    wanted = model(ids, attention_mask=with_log(ids, slice(3, 6), factor)).logits
    with boost(model, slice(3, 6), factor):
        assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_examples_hidden_beside_sinks_are_masked() -> None:
    model, ids = tiny("gpt_oss", layer_types=["full_attention"] * 3), prompt(2, 12)
    wanted = model(ids, attention_mask=with_log(ids, slice(1, 4), 0.0, first=8)).logits
    with group_attention(model, slice(1, 4), slice(5, 8), 1.0):
        assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_weights_that_are_no_softmax_of_scores_are_boosted_token_by_token_too() -> None:
    """A latent of ours: its weights can be edited, but not made anew under a mask."""
    rows = [prompt(1, 40, seed)[0].tolist() for seed in range(3)]
    model, ids = latent(tiny("llama"), 16, format="manyheads", calibration=rows), prompt(1, 12)
    padding = torch.ones_like(ids)
    with boost(model, slice(8, 11), 6.0):
        made = generated(model, ids, padding, None)
        wanted = whole_pass(model, made, padding).logits[:, 11:]
    assert_close(torch.stack(made.logits, 1), wanted, atol=1e-4, rtol=1e-4)
