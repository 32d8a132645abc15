"""KVzip: what a repetition looks at, from transformers' own attention weights, and the best of all layers and heads."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from recorder import held
from tiny_families import prompt, tiny
from torch import Tensor
from transformers import DynamicCache

from manyheads.shrink import AdaKV, KVzip, release

SIZE, REQUEST, AGAIN, SUFFIX = 24, [7, 8, 9], [11, 12], [5]


def oracle(model: Any, tokens: Tensor, chunk: int, sinks: int, asked: bool = True) -> dict[tuple[int, int, int], float]:
    """Scores by layer, KV head and position of one row [1, n], with a dense cache and eager attention."""
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    n, found = tokens.shape[1], {}
    for start in range(0, n, chunk):
        own = tokens[0, start : start + chunk].tolist()
        ask = REQUEST if not start else AGAIN + tokens[0, max(0, start - 8) : start].tolist()
        fed = torch.tensor([(ask + SUFFIX if asked else []) + own])
        out = model(fed, past_key_values=copy.deepcopy(cache), output_attentions=True)
        for layer, weights in enumerate(out.attentions):
            context = [*range(min(sinks, start)), *range(start, start + len(own)), *range(n, n + fed.shape[1])]
            part = weights[0][..., context] / weights[0][..., context].sum(-1, keepdim=True)
            for place, slot in enumerate(context[min(sinks, start) : min(sinks, start) + len(own)]):
                for head in range(2):
                    place_of = min(sinks, start) + place
                    found[layer, head, slot] = float(part[2 * head : 2 * head + 2, :, place_of].max())
    return {at: math.inf if at[2] < sinks else score for at, score in found.items()}


def best(score: dict[tuple[int, int, int], float], count: int) -> dict[tuple[int, int], list[int]]:
    kept: dict[tuple[int, int], list[int]] = {(layer, head): [] for layer in range(3) for head in range(2)}
    for layer, head, slot in sorted(score, key=lambda at: -score[at])[:count]:
        kept[layer, head].append(slot)
    return {at: sorted(slots) for at, slots in kept.items()}


def kept(cache: Any, row: int = 0, first: int = 0) -> dict[tuple[int, int], list[int]]:
    return {
        (layer, head): [slot - first for slot in slots]
        for layer, own in enumerate(cache.layers)
        for (at, head), slots in held(own).items()
        if at == row
    }


ASKED: dict[str, Any] = {"request": REQUEST, "again": AGAIN, "suffix": SUFFIX}


@pytest.mark.parametrize(("chunk", "asked"), [(100, False), (100, True), (10, True)])
def test_what_the_repetition_looks_at(chunk: int, asked: bool) -> None:
    model, tokens = tiny("llama").double(), prompt(1, SIZE)
    with torch.no_grad():
        wanted = best(oracle(model, tokens, chunk, 2, asked), 6 * 12)
        policy = KVzip(compression_ratio=0.5, sink_size=2, chunk_size=chunk, **(ASKED if asked else {}))
        cache = policy.make_cache(model)
        model(tokens, past_key_values=cache)
    assert kept(cache) == wanted
    assert len({length for own in cache.lengths() for length in own}) > 1
    release(model)


def test_by_layer() -> None:
    model, tokens = tiny("llama").double(), prompt(1, SIZE)
    with torch.no_grad():
        score = oracle(model, tokens, 100, 2)
        cache = KVzip(budget_tokens=9, sink_size=2, per_layer=True, **ASKED).make_cache(model)
        model(tokens, past_key_values=cache)
    for layer in range(3):
        own = best({at: value for at, value in score.items() if at[0] == layer}, 18)
        assert {at: slots for at, slots in kept(cache).items() if at[0] == layer} == {
            at: slots for at, slots in own.items() if at[0] == layer
        }
    release(model)


@pytest.mark.parametrize("chunk", [100, 9])
def test_rows_choose_for_themselves(chunk: int) -> None:
    """A padded row keeps what it keeps alone, chunks and all; and what follows reads what is left."""
    model, tokens = tiny("llama").double(), prompt(2, SIZE)
    padding = torch.ones(2, SIZE + 1, dtype=torch.long)
    padding[1, :7] = 0
    policy = KVzip(compression_ratio=0.5, sink_size=2, chunk_size=chunk, **ASKED)
    both, alone = policy.make_cache(model), policy.make_cache(model)
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(tokens, attention_mask=padding[:, :-1], position_ids=positions[:, :-1], past_key_values=both)
        model(tokens[1:, 7:], past_key_values=alone)
        assert kept(both, 1, 7) == kept(alone)
        assert both.get_seq_length() == SIZE
        more = {"attention_mask": padding, "position_ids": positions[:, -1:]}
        given = model(tokens[:, :1].flip(0), past_key_values=both, **more).logits[1]
        wanted = model(tokens[:1, :1], past_key_values=alone).logits[0]
    torch.testing.assert_close(given, wanted)
    release(model)


def test_in_generate_and_again_after_a_reset() -> None:
    """A block's caches each get their repetition; the block leaves the model as it was; decoded tokens stay."""
    model, tokens = tiny("llama"), prompt(2, SIZE)
    with KVzip(compression_ratio=0.5, sink_size=2)(model) as active:
        model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
        cache: Any = active.cache
        per_row = [sum(len(slots) for slots in kept(cache, row).values()) for row in range(2)]
        assert per_row == [6 * (12 + 3)] * 2
        cache.reset()
        model(tokens, past_key_values=cache)
        assert sum(len(slots) for slots in kept(cache).values()) == 6 * 12
        hooks = len(model.base_model._forward_hooks)
    active.cache = None
    del cache
    assert hooks == 1
    assert not model.base_model._forward_hooks


def test_embeddings_and_half_precision() -> None:
    model, tokens = tiny("llama").to(torch.bfloat16), prompt(2, SIZE)
    policy = KVzip(budget_tokens=8, sink_size=2, **ASKED)
    by_ids, by_rows = policy.make_cache(model), policy.make_cache(model)
    with torch.no_grad():
        model(tokens, past_key_values=by_ids)
        model(inputs_embeds=model.get_input_embeddings()(tokens), past_key_values=by_rows)
    assert kept(by_ids) == kept(by_rows)
    release(model)


def test_phrases() -> None:
    class Words:
        chat_template = "x"

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [len(text)]

        def apply_chat_template(self, turn: Any, **kwargs: Any) -> str:
            return f"<user>{turn[0]['content']}<end><assistant>"

    assert KVzip.phrases(Words()) == {
        "request": [len("\n\nRepeat the previous context exactly.")],
        "again": [len("\n\nRepeat the part of the previous context exactly, starting with")],
        "suffix": [len("<end><assistant>")],
    }


@pytest.mark.parametrize(("given", "match"), [
    ({"sink_size": -1}, "sink_size must be a whole number of at least 0"),
    ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1"),
    ({"request": "Repeat"}, "a token of request must be a whole number"),
    ({"when": "both"}, "when='both' is not possible"),
    ({"allocation": AdaKV()}, "which is its allocation"),
    ({"budget_tokens": 4}, "below the 5"),
])  # fmt: skip
def test_what_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        KVzip(**given)


def test_what_a_model_or_a_call_refuses() -> None:
    with pytest.raises(ValueError, match=r"sliding window.*full attention in all layers"):
        KVzip(budget_tokens=8).make_cache(tiny("mistral"))
    model = tiny("llama")
    with KVzip(budget_tokens=8)(model), pytest.raises(ValueError, match="without assistant_model and prompt_lookup"):
        model.generate(prompt(1, SIZE), max_new_tokens=4, prompt_lookup_num_tokens=2)
    mask = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"KVzip compares whole rows.*give a 2-D attention_mask"):
        model(prompt(1, SIZE), attention_mask=mask, past_key_values=KVzip(budget_tokens=8).make_cache(model))


@pytest.mark.parametrize("last", [8, 1])
def test_a_context_in_chunks(last: int) -> None:
    """What is kept is what is kept of one pass; the last chunk may be a single token."""
    model, tokens = tiny("llama").double(), prompt(2, SIZE)
    padding = torch.ones(2, SIZE, dtype=torch.long)
    padding[1, :3] = 0
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    policy = KVzip(compression_ratio=0.5, sink_size=2, chunk_size=9, **ASKED)
    caches = []
    for ends in ([SIZE], [10, SIZE - last, SIZE]):
        cache, start = policy.make_cache(model), 0
        cache.expect(SIZE)
        for end in ends:
            here = slice(start, end)
            given = {"attention_mask": padding[:, :end], "position_ids": positions[:, here]}
            with torch.no_grad():
                model(tokens[:, here], **given, past_key_values=cache)
            start = end
        caches.append(cache)
    for row in range(2):
        assert kept(caches[0], row) == kept(caches[1], row)
    assert min(len(slots) for slots in kept(caches[1]).values()) < SIZE
    release(model)


def test_a_prompt_that_generate_feeds_in_chunks() -> None:
    model, tokens = tiny("llama"), prompt(1, SIZE)
    found = []
    for chunk in (None, 7):
        with KVzip(compression_ratio=0.5, sink_size=2)(model) as active:
            model.generate(tokens, max_new_tokens=2, do_sample=False, eos_token_id=None, prefill_chunk_size=chunk)
        # generate feeds the prompt but for its last token when in chunks.
        found.append(sum(len(slots) for slots in kept(active.cache).values()))
    assert found[1] == found[0] == 6 * (SIZE // 2 + 1)
