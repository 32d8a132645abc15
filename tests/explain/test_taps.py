"""Taps: what they read is what the model's own eager attention uses, and they change nothing unless told to."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, prompt, tiny
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import EVERY, build, inputs

from manyheads import create_attention
from manyheads.hosts.taps import record, sites, tap
from manyheads.shrink import Full


def eager_maps(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The library's own weights, in the order encoder, decoder, cross, or text, vision."""
    model.set_attn_implementation("eager")
    return asked_maps(model, batch)


def asked_maps(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        out = model(**batch, output_attentions=True)
    found: list[Tensor] = []
    parts = (out, getattr(out, "text_model_output", None), getattr(out, "vision_model_output", None))
    for part in parts:
        for key in ("encoder_attentions", "decoder_attentions", "cross_attentions", "attentions"):
            found += list(getattr(part, key, None) or ())
    return found


def in_order(calls: list[Any]) -> list[Any]:
    place = {("encoder", "self"): 0, ("decoder", "self"): 1, ("decoder", "cross"): 2, ("language", "self"): 0}
    return sorted(calls, key=lambda call: (place.get((call.site.stack, call.site.kind), 3), call.layer))


def logits(out: Any) -> Tensor:
    for key in ("logits", "last_hidden_state", "logits_per_text"):
        if getattr(out, key, None) is not None:
            return getattr(out, key)
    raise AssertionError(type(out))


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_the_eager_weights(name: str) -> None:
    model, batch = build(name), inputs(name)
    if name not in FAMILIES:  # decoders take the softmax in float32 whatever their own type
        model = model.double()
        batch = {key: own.double() if own.is_floating_point() else own for key, own in batch.items()}
    wanted_out = logits(model(**batch)).detach()
    with torch.no_grad(), record(model) as calls:
        given_out = logits(model(**batch))
        given = [call.weights() for call in in_order(calls)]
    wanted = eager_maps(model, batch)
    assert len(given) == len(wanted) == len(sites(model))
    real = batch["attention_mask"].bool() if "attention_mask" in batch else None
    for call, own, theirs in zip(in_order(calls), given, wanted, strict=True):
        if real is not None and own.shape[2] == real.shape[1] and call.site.stack != "vision":
            own, theirs = own.transpose(1, 2)[real], theirs.transpose(1, 2)[real]
        assert_close(own, theirs, atol=1e-6, rtol=0)
        assert_close(call.weights([2], slice(3, 6)), call.weights()[:, 2:3, 3:6], atol=1e-6, rtol=0)
    keep = real if real is not None and given_out.shape[:2] == real.shape else slice(None)
    assert_close(given_out[keep], wanted_out[keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_weights_that_the_caller_asks_for_are_given_under_a_tap(name: str) -> None:
    model, batch = build(name), inputs(name)
    wanted = eager_maps(model, batch)
    with record(model):
        given = asked_maps(model, batch)
    assert len(given) == len(wanted) > 0
    real = batch["attention_mask"].bool() if "attention_mask" in batch else None
    for own, theirs in zip(given, wanted, strict=True):
        if real is not None and own.shape[2] == real.shape[1]:
            own, theirs = own.transpose(1, 2)[real], theirs.transpose(1, 2)[real]
        assert_close(own, theirs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_weights_asked_for_while_decoding_are_as_wide_as_eager_ones(name: str, cache: str) -> None:
    model, ids = tiny(name), torch.arange(3, 19)[None]
    model.set_attn_implementation("eager")
    wanted, found = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}, []
    for around in (nullcontext(), record(model)):
        with around:
            made = model.generate(ids, **wanted, output_attentions=True, return_dict_in_generate=True)
        found.append([layer for step in made.attentions for layer in step])
    assert len(found[0]) == 4 * len(sites(model))
    for theirs, own in zip(*found, strict=True):
        assert_close(own, theirs)


def test_weights_that_the_caller_asks_for_are_those_of_the_last_edit() -> None:
    model, ids = tiny("llama"), torch.arange(3, 9)[None]
    model.set_attn_implementation("eager")
    with tap(model, lambda call: call.mix(lambda weights, rows: 0 * weights, heads=[1]), layers=[1]):
        maps = model(ids, output_attentions=True).attentions
    assert not maps[1][:, 1].any()
    assert maps[1][:, [0, 2]].any(-1).all()
    assert maps[0].any(-1).all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5", "vit"])
def test_a_tap_that_reads_nothing_changes_nothing(name: str) -> None:
    model, batch = build(name), inputs(name)
    if name != "gemma2":
        model.set_attn_implementation("sdpa")
    configs = [id(module.__dict__.get("config")) for module in model.modules()]
    with torch.no_grad():
        wanted = logits(model(**batch))
        with tap(model, lambda call: None):
            given = logits(model(**batch))
        after = logits(model(**batch))
    # The same kernel on the same tensors, where it has no soft cap; what stands in padding is nobody's.
    real = batch["attention_mask"].bool() if name == "gemma2" else slice(None)
    assert_close(given[real], wanted[real], atol=1e-5 if name == "gemma2" else 0, rtol=0)
    assert_close(after, wanted, atol=0, rtol=0)
    assert configs == [id(module.__dict__.get("config")) for module in model.modules()]


def test_outputs_are_weights_times_values_and_flow_on() -> None:
    model, tokens = tiny("llama"), prompt(2, 9)
    with torch.no_grad(), record(model) as calls:
        model(tokens)
    for call in calls:
        weights = call.weights()
        for head in range(4):
            for row in range(9):
                own = sum(weights[0, head, row, j] * call.value[0, head // 2, j] for j in range(9))
                assert_close(call.output[0, head, row], own, atol=1e-6, rtol=1e-5)
        projected = call.site.module.o_proj(call.output.transpose(1, 2).flatten(2))
        assert projected.shape == (2, 9, 32)


def test_gradients_of_weights_are_those_of_an_explicit_matrix() -> None:
    """By an additive zero [b, h, n, m] on the weights, through `mix`, whose gradient autograd knows."""
    model, tokens = tiny("llama").double(), prompt(1, 8)
    with record(model, gradients=True) as calls:
        model(tokens).logits[0, -1, 5].backward()
    given = [call.weight_gradients() for call in calls]
    zeros = [torch.zeros(1, 4, 8, 8, dtype=torch.float64, requires_grad=True) for _ in calls]
    with tap(model, lambda call: call.mix(lambda weights, rows: weights + zeros[call.layer][:, :, rows])):
        model(tokens).logits[0, -1, 5].backward()
    for own, zero in zip(given, zeros, strict=True):
        assert zero.grad is not None
        assert float(zero.grad.abs().max()) > 1e-4
        assert_close(own, zero.grad, atol=1e-12, rtol=1e-9)
    assert_close(calls[1].weight_gradients([3], slice(2, 4)), given[1][:, 3:4, 2:4])


def test_gradients_come_without_trainable_parameters() -> None:
    model = tiny("llama").requires_grad_(False)
    with record(model, gradients=True) as calls:
        model(prompt(1, 8)).logits.sum().backward()
    assert all(float(call.output.grad.abs().max()) > 0 for call in calls)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "t5"])
def test_mixing_with_the_same_weights_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyheads.hosts.calls.BLOCK_WEIGHTS", 200)  # several blocks of rows
    model, batch = build(name), inputs(name)
    with torch.no_grad():
        with tap(model, lambda call: None):
            wanted = logits(model(**batch))
        with tap(model, lambda call: call.mix(lambda weights, rows: weights, heads=[1, 3])):
            given = logits(model(**batch))
    assert_close(given, wanted, atol=1e-5, rtol=1e-5)


def test_a_changed_head_changes_the_output_as_a_model_without_it() -> None:
    model, tokens = tiny("llama"), prompt(1, 8)

    def silence(call: Any) -> Tensor:
        return call.replaced(torch.zeros_like(call.output[:, [2]]), [2])

    with torch.no_grad():
        with tap(model, silence, layers=[1]):
            given = model(tokens).logits
        untouched = model(tokens).logits
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
        wanted = model(tokens).logits
    assert_close(given, wanted, atol=1e-6, rtol=1e-5)
    assert float((given - untouched).abs().max()) > 1e-3


def test_nested_taps_read_in_turn() -> None:
    model, tokens, seen = tiny("llama"), prompt(1, 5), []

    def zero(call: Any) -> Tensor:
        seen.append("zero")
        return torch.zeros_like(call.output)

    def look(call: Any) -> None:
        seen.append(float(call.output.abs().max()))

    with tap(model, zero, layers=[0]), tap(model, look, layers=[0]):
        model(tokens)
    assert seen == ["zero", 0.0]


def test_decoding_with_a_cache() -> None:
    model, tokens = tiny("llama"), prompt(1, 9)
    with torch.no_grad(), record(model, layers=[2]) as calls:
        model.generate(tokens, max_new_tokens=3, do_sample=False)
        full = model(tokens).logits
    assert [call.query.shape[2] for call in calls] == [9, 1, 1, 9]
    assert calls[2].weights().shape == (1, 4, 1, 11)
    assert_close(calls[2].weights().sum(-1), torch.ones(1, 4, 1))
    assert full.shape == (1, 9, 61)


class Mixers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = create_attention("softmax", 16, 4, causal=True)
        self.second = create_attention("hedgehog", 16, 4, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x).output).output


def test_mechanisms_give_their_effective_weights_and_take_a_new_output() -> None:
    model, x = Mixers(), torch.randn(2, 6, 16)
    wanted = model(x)
    with record(model) as calls:
        given = model(x)
    assert_close(given, wanted, atol=0, rtol=0)
    assert [call.site.path for call in calls] == ["first", "second"]
    assert calls[1].layer == 1
    assert_close(calls[0].weights([1]), model.first(x, need_weights=True).weights[:, [1]])
    assert_close(calls[1].weights().sum(-1), torch.ones(2, 4, 6))
    with tap(model, lambda call: torch.zeros_like(call.output), layers=[0]):
        assert_close(model(x), model.second(x).output)


def test_a_mechanism_with_a_state_is_not_run_twice() -> None:
    mechanism = create_attention("softmax", 16, 4, causal=True)
    x, state = torch.randn(1, 6, 16), mechanism.init_state(1)
    with record(mechanism) as calls:
        mechanism(x[:, :4], state=state)
        mechanism(x[:, 4:], state=state)
    assert state.length == 6
    assert_close(calls[1].weights(), mechanism(x, need_weights=True).weights[:, :, 4:])


def test_memory_of_one_head_at_length_8192_stays_in_blocks() -> None:
    model = tiny("llama", num_hidden_layers=1, max_position_embeddings=8192)
    with torch.no_grad(), record(model) as calls:
        model.model(prompt(1, 8192))
    widths = [rows.stop - rows.start for rows in calls[0].blocks([0])]
    assert sum(widths) == 8192
    assert max(widths) * 8192 * 4 <= 2**24
    total = sum(float(calls[0].weights([0], rows).sum()) for rows in calls[0].blocks([0]))
    assert math.isclose(total, 8192, rel_tol=1e-4)


def refused(message: str, model: nn.Module, reader: Any = lambda call: None, **choice: Any) -> None:
    with pytest.raises(ValueError, match=message), tap(model, reader, **choice):
        model(prompt(1, 4))


def test_what_is_refused() -> None:
    model = tiny("llama")
    refused("Linear has no attention that can be tapped", nn.Linear(2, 2))
    refused("no such layers", model, layers=[3])
    refused("no such layers", model, kind="cross")
    refused("heads 0 to 3; got \\[4\\]", model, lambda call: call.mix(lambda weights, rows: weights, heads=[4]))
    refused("a reader returned", model, lambda call: call.output[:, :1])
    with record(model) as calls:
        model(prompt(1, 4))
    with pytest.raises(ValueError, match="no gradient has reached"):
        calls[0].weight_gradients()
    with Full()(model), pytest.raises(ValueError, match="tap it outside the policy"), tap(model, lambda call: None):
        pass
    # After errors the model is its own again.
    assert model.config._attn_implementation == "eager"
