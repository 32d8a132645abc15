"""Caches that hold the latest tokens alone, or a buffer that is longer than the text: places stay those of the text."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from manyheads.hosts.taps import record, tap
from manyheads.steer import boost, calibrate, juice, perturb, redistribute, steer
from manyheads.steer.beliefs import pushed
from manyheads.steer.focus_icl import focus_icl

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "initializer_range": 0.3, "eos_token_id": None,
    "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
SHARED = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma4_text": {"sliding_window": 6, "head_dim": 8, "global_head_dim": 8, "layer_types": MIXED, **SHARED},
}
IDS = torch.tensor([[1, 5, 9, 12, 7, 33, 8, 41, 17, 9, 22, 30, 28, 6, 11]])
NEW = 4


def model(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval().double()


def vectors() -> dict[tuple[int, int], Tensor]:
    return {(1, 0): torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


OPENED: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "boost": lambda m: boost(m, slice(1, 4), 5.0),
    "boost late": lambda m: boost(m, range(10, 14), 5.0, heads=[(1, 2), (2, 0)]),
    "hidden span": lambda m: boost(m, range(10, 14), 0.0),
    "pushed": lambda m: pushed(m, vectors(), 3.0, first=len(IDS[0]) - 1),
    "perturb": lambda m: perturb(m, 0.5, heads=[(1, 0), (2, 3)]),
    "focus_icl": lambda m: focus_icl(m, slice(3, 9), 2, dropped=0.3),
    "redistribute": lambda m: redistribute(
        m, slice(3, 9), 0.5, sink_dims=[1, 2], threshold=0.5, centric=0.0, least=0.0
    ),
    "steer": lambda m: steer(m, vectors(), 2.0),
    "juice": lambda m: juice(m, {(1, 0): 1.5}),
}


def generated(m: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out = m.generate(
        IDS, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences, torch.stack(out.logits, 1).double()


@torch.no_grad()
def read_at_once(m: Any, sequence: Tensor) -> Tensor:
    """The logits of each new token without a cache."""
    last = range(len(IDS[0]), len(IDS[0]) + NEW)
    return torch.stack([m(sequence[:, :end], use_cache=False).logits[:, -1] for end in last], 1)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_under_an_intervention_is_what_reading_at_once_gives(kind: str, options: dict[str, Any]) -> None:
    m = model(kind)
    for name, opened in OPENED.items():
        if (name, kind) == ("redistribute", "gemma4_text"):
            continue  # layers that share keys read one place of the prompt: sinks of the others are not known, refused
        with opened(m):
            sequence, logits = generated(m, **options)
            wanted = read_at_once(m, sequence)
        assert_close(logits, wanted, atol=1e-5, rtol=1e-5, msg=lambda found, name=name: f"{name}: {found}")


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_those_of_the_text_and_a_tap_changes_nothing(kind: str) -> None:
    m = model(kind)
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        sequence, logits = generated(m, **options)
        with record(m) as calls:
            again = generated(m, **options)
        assert torch.equal(again[0], sequence)
        # Caps of scores are computed by a loop of ours, which rounds in its own way.
        close = {"atol": 1e-6, "rtol": 1e-6} if kind == "gemma2" else {"atol": 0.0, "rtol": 0.0}
        assert_close(again[1], logits, **close)
        # A tap of one layer switches all of them.
        with tap(m, lambda call: None, layers=[2]):
            assert_close(generated(m, **options)[1], logits, **close)
        late = calls[-4:]
        assert [call.key.shape[2] for call in late] == [len(IDS[0]) + NEW - 1] * 4
        with torch.no_grad(), record(m) as whole:
            m(sequence[:, :-1], use_cache=False)
        for own, wanted in zip(late, whole, strict=True):
            assert_close(own.weights()[..., -1, :], wanted.weights()[..., -1, :], atol=1e-6, rtol=1e-5)


def test_padded_rows_and_beams_with_a_window() -> None:
    m = model("mistral")
    ids = torch.cat([IDS, IDS.roll(4, 1)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids[1, :3] = 0
    with boost(m, range(8, 12), 6.0):
        beams = m.generate(ids, attention_mask=mask, max_new_tokens=NEW, num_beams=3, do_sample=False)
        plain = m.generate(ids, attention_mask=mask, max_new_tokens=NEW, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, plain)


def test_sinks_found_on_the_prompt_stay_those_when_the_window_moves_on() -> None:
    m = model("gemma2")
    with calibrate(m, 0.3, alpha=1.5), torch.no_grad():
        cache = m(IDS).past_key_values
        first = m(torch.tensor([[4]]), past_key_values=cache).logits[:, -1]
        cache = m(IDS, past_key_values=transformers.StaticCache(m.config, 24)).past_key_values
        static = m(torch.tensor([[4]]), past_key_values=cache).logits[:, -1]
    assert_close(static, first, atol=1e-8, rtol=1e-8)


def test_nothing_holds_a_cache_when_the_block_is_left() -> None:
    m = model("mistral")
    cache = transformers.DynamicCache(config=m.config)
    seen = weakref.ref(cache)
    with boost(m, [1], 2.0), torch.no_grad():
        m(IDS, past_key_values=cache)
    del cache
    gc.collect()
    assert seen() is None
