"""LXMERT: two towers and cross attention both ways, by code of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LxmertConfig, LxmertModel

from manyheads.explain.attributions import METHODS
from manyheads.hosts.taps import record, sites, tap
from manyheads.steer import scaled


def lxmert() -> Any:
    torch.manual_seed(2)
    config = LxmertConfig(
        vocab_size=61, hidden_size=32, num_attention_heads=4, intermediate_size=48, l_layers=3, r_layers=2, x_layers=2,
        visual_feat_dim=10, visual_pos_dim=4, max_position_embeddings=32,
    )  # fmt: skip
    model = LxmertModel(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def given() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1)
    text = torch.ones(2, 7, dtype=torch.long)
    text[1, 5:] = 0
    seen = torch.ones(2, 5, dtype=torch.long)
    seen[0, 4:] = 0
    return {
        "input_ids": torch.randint(3, 61, (2, 7), generator=made), "attention_mask": text,
        "visual_feats": torch.randn(2, 5, 10, generator=made, dtype=torch.float64),
        "visual_pos": torch.rand(2, 5, 4, generator=made, dtype=torch.float64), "visual_attention_mask": seen,
    }  # fmt: skip


def test_weights_are_those_that_the_model_tells() -> None:
    model, batch = lxmert(), given()
    with torch.no_grad():
        wanted = model(**batch, output_attentions=True)
        with record(model) as calls:
            out = model(**batch)
    assert_close(out.pooled_output, wanted.pooled_output, atol=0, rtol=0)
    assert len(calls) == len(sites(model)) == 3 + 2 + 2 * 4
    by_place = {(call.site.stack, call.site.kind, call.layer): call for call in calls}
    for layer, own in enumerate(wanted.language_attentions):
        assert_close(by_place["language", "self", layer].weights(), own)
    for layer, own in enumerate(wanted.vision_attentions):
        assert_close(by_place["vision", "self", layer].weights(), own)
    for layer, own in enumerate(wanted.cross_encoder_attentions):
        assert_close(by_place["language", "cross", layer].weights(), own)
    for call in calls:
        assert_close(call.weights() @ call.value, call.output)
    back = by_place["vision", "cross", 0]
    assert (back.query.shape[2], back.key.shape[2]) == (5, 7)
    assert not back.weights()[1, :, :, 5:].any()


@pytest.mark.parametrize(
    ("stack", "kind", "count"), [("vision", "cross", 2), ("language", "self", 5), ("vision", None, 6)]
)
def test_one_stack_alone(stack: str, kind: str | None, count: int) -> None:
    model, batch = lxmert(), given()
    with torch.no_grad(), record(model, stack=stack, kind=kind) as calls:
        model(**batch)
        model(**batch)
    assert [call.site.stack for call in calls] == [stack] * 2 * count
    with pytest.raises(ValueError, match="say which by stack="), tap(model, lambda call: None, layers=[0]):
        pass


@pytest.mark.parametrize(("stack", "part"), [("language", "lang_self_att"), ("vision", "visn_self_att")])
def test_a_silent_head_is_one_whose_map_is_zero(stack: str, part: str) -> None:
    model, batch = lxmert(), given()
    layer = {"language": 3, "vision": 2}[stack]
    with torch.no_grad():
        untouched = model(**batch).pooled_output
        with scaled(model, {(layer, 1): 0.0}, stack=stack):
            silent = model(**batch)
        getattr(model.encoder.x_layers[0], part).output.dense.weight[:, 8:16] = 0
        wanted = model(**batch)
    assert_close(silent.language_output, wanted.language_output)
    assert_close(silent.vision_output, wanted.vision_output)
    assert float((silent.pooled_output - untouched).abs().max()) > 1e-6


def test_gradients_of_weights_are_those_of_an_added_zero() -> None:
    model, batch = lxmert(), given()
    with record(model, gradients=True) as calls:
        model(**batch).pooled_output.sum().backward()
    zeros = [torch.zeros_like(call.weights()).detach().requires_grad_() for call in calls]
    order = iter(zeros)

    def edited(call: Any) -> Tensor:
        zero = next(order)
        return call.mix(lambda weights, rows: weights + zero[:, :, rows])

    with tap(model, edited):
        model(**batch).pooled_output.sum().backward()
    for call, zero in zip(calls, zeros, strict=True):
        if zero.grad is not None and call.output.grad is not None:
            assert_close(call.weight_gradients(), zero.grad, atol=1e-10, rtol=1e-7)
    assert sum(zero.grad is not None for zero in zeros) >= 11


@pytest.mark.parametrize("name", ["rollout", "relevance", "attention-gradient", "value-norm"])
def test_attributions_tell_of_both_streams(name: str) -> None:
    model, batch = lxmert(), given()
    method = METHODS[name](model, lambda out: out.pooled_output.norm(dim=-1))
    found = method.attribute(batch)
    assert {stream: tuple(each.shape) for stream, each in found.items()} == {"language": (2, 7), "vision": (2, 5)}
    assert all(float(each.abs().max()) > 0 for each in found.values())
    assert not found["language"][1, 5:].any()
    assert not found["vision"][0, 4:].any()


def test_a_pass_that_broke_off_between_both_directions_leaves_no_trace() -> None:
    model, batch = lxmert(), given()
    with torch.no_grad(), record(model, kind="cross") as calls:
        with pytest.raises(RuntimeError), tap(model, _break, stack="language", kind="cross"):
            model(**batch)
        model(**batch)
    assert [call.site.stack for call in calls] == ["language", *["language", "vision"] * 2]


def _break(call: Any) -> None:
    raise RuntimeError
