"""Tokens that leave between layers: the whole model with their keys hidden is what the others must equal."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from vision_hosts import IMAGE, batch, grown, hidden, llava

from manyheads.steer.thinning.tokens import Step, after_image, thinned

# Before layer 1 image tokens 2, 3 (and 5 of the second row) leave, before layer 3 more.
LEAVE = {1: [[2, 3], [2, 3, 5]], 3: [[0, 7, 8], [0]]}


def rule(step: Step) -> Tensor | None:
    if step.layer not in LEAVE:
        return None
    stays = torch.ones_like(step.image)
    beams = max(1, len(stays) // 2)
    for b in range(len(stays)):
        first = int(GIVEN["input_ids"][b // beams].eq(IMAGE).nonzero()[0])
        for number in LEAVE[step.layer][b // beams]:
            stays[b] &= step.places[b] != first + number
    return stays


GIVEN = batch()


def gone(given: dict[str, Tensor], length: int, layers: int = 4) -> dict[int, Tensor]:
    found = {}
    for layer in range(layers):
        out = torch.zeros(2, length, dtype=torch.bool)
        for at, rows in LEAVE.items():
            for b, numbers in enumerate(rows if layer >= at else []):
                first = int(given["input_ids"][b].eq(IMAGE).nonzero()[0])
                out[b, [first + number for number in numbers]] = True
        found[layer] = out
    return found


def kept(given: dict[str, Tensor], length: int) -> Tensor:
    real = torch.ones(2, length, dtype=torch.bool)
    real[:, : given["attention_mask"].shape[1]] = given["attention_mask"].bool()
    return real & ~gone(given, length)[3]


WORDS = torch.tensor([[12, 13, 14, 15, 16, 17], [22, 23, 24, 25, 26, 27]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
def test_a_prompt_decoding_and_a_second_turn_equal_the_whole_model_with_keys_hidden(
    text: str, implementation: str
) -> None:
    window = 9 if text == "mistral" else None
    model = llava(text, attn_implementation=implementation, **({"sliding_window": window} if window else {}))
    whole = grown(GIVEN, WORDS)
    with torch.no_grad():
        with hidden(model, gone(GIVEN, 21), whole["attention_mask"], window):
            wanted = model(**whole, use_cache=False).logits
        with thinned(model, rule) as thinning:
            out = model(**GIVEN, use_cache=True)
            found, cache = [out.logits], out.past_key_values
            for start, stop in ((15, 16), (16, 17), (17, 20), (20, 21)):  # a second turn of three at once
                found.append(
                    model(
                        input_ids=whole["input_ids"][:, start:stop],
                        attention_mask=whole["attention_mask"][:, :stop],
                        position_ids=whole["position_ids"][:, start:stop],
                        past_key_values=cache,
                    ).logits
                )
    there = kept(GIVEN, 21)
    assert_close(torch.cat(found, 1)[there], wanted[there])
    assert [layer.keys.shape[2] for layer in cache.layers] == [21, 19, 19, 16]
    assert thinning.image_tokens == [[9, 9], [7, 6], [7, 6], [4, 5]]
    assert thinning.held_bytes == sum(2 * layer.keys.numel() * 8 for layer in cache.layers)
    assert thinning.full_bytes == 4 * 2 * (2 * 2 * 21 * 8) * 8


def test_rows_that_keep_alike_without_padding_run_without_a_mask() -> None:
    model = llava()
    given = {name: own[:1] for name, own in GIVEN.items()}
    del given["attention_mask"], given["position_ids"]
    masks: list[Any] = []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    with torch.no_grad(), thinned(model, rule):
        found = model(**given).logits
    assert masks == [None] * 4
    with torch.no_grad(), hidden(model, {i: own[:1] for i, own in gone(GIVEN, 15).items()}, torch.ones(1, 15)):
        wanted = model(**given).logits
    there = kept(GIVEN, 15)[:1]
    assert_close(found[there], wanted[there])


def test_right_padding() -> None:
    given, model = batch("right"), llava()
    model = model.eval()

    def right(step: Step) -> Tensor | None:
        if step.layer != 1:
            return None
        return ~gone(given, 15)[1].gather(1, step.places)

    hide = {layer: gone(given, 15)[1] if layer else torch.zeros(2, 15, dtype=torch.bool) for layer in range(4)}
    with torch.no_grad():
        with thinned(model, right):
            found = model(**given).logits
        with hidden(model, hide, given["attention_mask"]):
            wanted = model(**given).logits
    there = given["attention_mask"].bool() & ~hide[3]
    assert_close(found[there], wanted[there])


def test_generate_is_what_the_whole_model_with_keys_hidden_says() -> None:
    model = llava()
    given = {name: own for name, own in GIVEN.items() if name != "position_ids"}
    with torch.no_grad(), thinned(model, rule):
        found = model.generate(**given, max_new_tokens=6, do_sample=False)
        beams = model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=2)
        cache = transformers.DynamicCache()
        assert_close(model.generate(**given, max_new_tokens=3, do_sample=False, past_key_values=cache), found[:, :18])
        longer = grown(GIVEN, found[:, 15:18])
        longer = {"input_ids": longer["input_ids"], "attention_mask": longer["attention_mask"]}
        again = model.generate(**longer, max_new_tokens=3, do_sample=False, past_key_values=cache)
    assert_close(again, found)
    assert beams.shape == found.shape
    for length in range(15, 21):
        whole = grown(GIVEN, found[:, 15:length])
        with torch.no_grad(), hidden(model, gone(GIVEN, length), whole["attention_mask"]):
            told = model(**whole, use_cache=False).logits[:, -1].argmax(-1)
        assert_close(told, found[:, length])


def test_beams_are_those_of_the_whole_model_with_keys_hidden() -> None:
    model = llava()
    given = {name: own for name, own in GIVEN.items() if name != "position_ids"}
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "return_dict_in_generate": True,
                "output_scores": True}  # fmt: skip
    with torch.no_grad(), thinned(model, rule):
        found = model.generate(**given, **settings)
    scores = torch.zeros(2, dtype=torch.float64)
    for step in range(5):
        whole = grown(GIVEN, found.sequences[:, 15 : 15 + step])
        with torch.no_grad(), hidden(model, gone(GIVEN, 15 + step), whole["attention_mask"]):
            told = model(**whole, use_cache=False).logits[:, -1].log_softmax(-1)
        scores += told.gather(1, found.sequences[:, 15 + step : 16 + step])[:, 0]
    assert_close(found.sequences_scores.double(), scores / 5, atol=1e-5, rtol=1e-5)


def test_tokens_taken_back_are_as_if_they_had_not_come() -> None:
    model = llava()
    whole = grown(GIVEN, WORDS)

    def fed(cache: Any, start: int, stop: int) -> Tensor:
        return model(
            input_ids=whole["input_ids"][:, start:stop], attention_mask=whole["attention_mask"][:, :stop],
            position_ids=whole["position_ids"][:, start:stop], past_key_values=cache,
        ).logits  # fmt: skip

    with torch.no_grad(), thinned(model, rule):
        cache = model(**GIVEN).past_key_values
        wanted = fed(cache, 15, 18)
        cache.crop(-2)
        assert cache.get_seq_length() == 16
        assert_close(fed(cache, 16, 18), wanted[:, 1:])
        cache.batch_select_indices(torch.tensor([1]))
        alone = model(
            input_ids=whole["input_ids"][1:, 18:19], attention_mask=whole["attention_mask"][1:, :19],
            position_ids=whole["position_ids"][1:, 18:19], past_key_values=cache,
        ).logits  # fmt: skip
        cache = model(**GIVEN).past_key_values
        fed(cache, 15, 18)
        assert_close(fed(cache, 18, 19)[1:], alone)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(model(**GIVEN, past_key_values=cache).logits, model(**GIVEN).logits)


def test_a_second_image_in_a_later_turn() -> None:
    model = llava(layers=2)
    more = torch.tensor([[2, *[IMAGE] * 9, 7], [3, *[IMAGE] * 9, 8]])
    whole = grown(GIVEN, more)
    pixels = torch.cat([GIVEN["pixel_values"], GIVEN["pixel_values"].flip(0)])
    odd = whole["input_ids"].eq(IMAGE) & (torch.arange(26) % 2 == 1)

    def odd_leave(step: Step) -> Tensor | None:
        return (step.start + step.places) % 2 == 0 if step.layer == 1 else None

    # The library takes pictures in the order of the rows.
    both = {**whole, "pixel_values": pixels[[0, 2, 1, 3]]}
    with torch.no_grad():
        with hidden(model, {0: torch.zeros_like(odd), 1: odd}, whole["attention_mask"]):
            wanted = model(**both).logits
        with thinned(model, odd_leave):
            cache = model(**GIVEN).past_key_values
            found = model(
                input_ids=more, attention_mask=whole["attention_mask"], position_ids=whole["position_ids"][:, 15:],
                pixel_values=pixels[2:], past_key_values=cache,
            ).logits  # fmt: skip
    there = ~odd[:, 15:]
    assert_close(found[there], wanted[:, 15:][there])


def test_nothing_leaves_nothing_changes() -> None:
    model = llava().float()
    given = {**GIVEN, "pixel_values": GIVEN["pixel_values"].float()}
    with torch.no_grad():
        wanted = model(**given).logits
        with thinned(model, lambda step: torch.ones_like(step.image)):
            assert torch.equal(model(**given).logits, wanted)
        assert torch.equal(model(**given).logits, wanted)
        # What a rule says of words, padding and filling does not count.
        with thinned(model, lambda step: step.image):
            assert torch.equal(model(**given).logits, wanted)


def test_bfloat16_and_gradients() -> None:
    model = llava().bfloat16()
    given = {**GIVEN, "pixel_values": GIVEN["pixel_values"].bfloat16()}
    with torch.no_grad():
        with thinned(model, rule):
            found = model(**given).logits
        with hidden(model, gone(GIVEN, 15), GIVEN["attention_mask"]):
            wanted = model(**given).logits
    there = kept(GIVEN, 15)
    assert found.dtype == torch.bfloat16
    assert float((found - wanted)[there].float().abs().max()) < 0.1 * float(wanted[there].float().abs().max())

    model, labels = llava(), GIVEN["input_ids"].clone()
    labels[:, :13] = -100  # no loss of a logit of what has left
    weight = model.model.language_model.layers[0].self_attn.k_proj.weight
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            # The older releases have the second name alone, the newer ones warn of it.
            model.train()
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            name = next(name for name in signature(enable).parameters if name.endswith("_kwargs"))
            enable(**{name: {"use_reentrant": False}})
        with thinned(model, rule):
            model.zero_grad()
            model(**GIVEN, labels=labels, use_cache=False).loss.backward()
        grads.append(weight.grad.clone())
    model.eval().zero_grad()
    with hidden(model, gone(GIVEN, 15), GIVEN["attention_mask"]):
        model(**GIVEN, labels=labels, use_cache=False).loss.backward()
    assert_close(grads[0], weight.grad)
    assert_close(grads[1], weight.grad)


def test_what_a_layer_attended_to_is_told_of_what_is_there() -> None:
    model, sizes = llava(), []

    def read(call: Any, step: Step) -> None:
        sizes.append((call.layer, call.key.shape[2], step.image.sum(1).tolist(), after_image(step).sum(1).tolist()))

    with torch.no_grad(), thinned(model, rule, watch=[0, 2], read=read):
        cache = model(**GIVEN).past_key_values
        model(
            input_ids=WORDS[:, :1], attention_mask=grown(GIVEN, WORDS[:, :1])["attention_mask"], past_key_values=cache
        )
    assert sizes == [(0, 15, [9, 9], [3, 2]), (2, 13, [7, 6], [3, 2])]


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    model = llava()
    ids = torch.tensor([[1, 5, 6, 7]])
    ones, dense = torch.ones(2, 15), torch.ones(2, 1, 15, 15, dtype=torch.bool)
    again = torch.arange(15).remainder(8).expand(2, -1)
    static = transformers.StaticCache(model.config.text_config, 40)
    with thinned(model, rule):
        for words, call in (
            ("no image token", lambda: model(input_ids=ids)),
            ("input_ids", lambda: model(inputs_embeds=torch.zeros(1, 4, 32, dtype=torch.float64))),
            ("input_ids", lambda: model.model.language_model(input_ids=ids)),
            ("packed", lambda: model(**{**GIVEN, "attention_mask": ones, "position_ids": again})),
            ("attention_mask", lambda: model(**{**GIVEN, "attention_mask": dense})),
            ("StaticCache", lambda: model(**GIVEN, past_key_values=static)),
            ("prefill_chunk_size", lambda: model.generate(**GIVEN, max_new_tokens=2, prefill_chunk_size=4)),
            ("another block", lambda: thinned(model, rule).__enter__()),
        ):  # fmt: skip
            with torch.no_grad(), pytest.raises(ValueError, match=words):
                call()
        with torch.no_grad():
            cache = model(**GIVEN).past_key_values
    with torch.no_grad(), pytest.raises(ValueError, match="inside of such a block"):
        model(input_ids=ids[:, :1].expand(2, -1), past_key_values=cache)
    with torch.no_grad(), thinned(model, lambda step: torch.ones(1, 1)), pytest.raises(ValueError, match="bool"):
        model(**GIVEN)
    plain = transformers.LlamaForCausalLM(model.config.text_config)
    with pytest.raises(ValueError, match="image tokens"), thinned(plain, rule):
        pass
    model.model.language_model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="sdpa"), thinned(model, rule):
        pass
