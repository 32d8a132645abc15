"""Taps under gradient checkpointing: backward computes layers anew, and what a tap did holds then too."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from zoo import build, inputs

from manyheads.hosts.taps import record, tap
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM
from manyheads.steer import boost, calibrate, juice, perturb, redistribute, scaled, steer

Gradients = dict[str, Tensor]
WAYS = [None, False, True]  # no checkpointing; use_reentrant


def halved(call: Any) -> Tensor:
    return call.output * 0.5


def shifted(call: Any) -> Tensor:
    return call.output + 0.25 * (1 + call.layer)


def training(model: Any, reentrant: bool | None) -> Any:
    model.train()
    if reentrant is not None:
        # The older releases have the second name alone, the newer ones warn of it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        names = inspect.signature(enable).parameters
        enable(**{next(name for name in names if name.endswith("_kwargs")): {"use_reentrant": reentrant}})
    return model


def mixed() -> Any:
    config = ManyheadsConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layers=["softmax", "based"]
    )
    torch.manual_seed(0)
    return ManyheadsForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny("llama"),  # its own attention is eager: another kernel, and another kind of mask
    "gemma2": lambda: tiny("gemma2"),
    "bart": lambda: build("bart"),
    "mechanisms": mixed,
}


def batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    tokens = {"input_ids": prompt(2, 9, seed=seed), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    tokens["attention_mask"][1, :2] = 0
    return {**inputs("bart"), **tokens} if name == "bart" else tokens


def gradients(model: Any) -> Gradients:
    return {name: own.grad for name, own in model.named_parameters() if own.grad is not None}


def alike(found: list[Gradients]) -> None:
    assert max(float(own.abs().max()) for own in found[0].values()) > 1e-3
    for other in found[1:]:
        assert set(other) == set(found[0])
        for name, own in found[0].items():
            assert_close(other[name], own, atol=2e-5, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_a_closed_taps_changes_are_in_the_gradients(name: str) -> None:
    """Several forward passes, each under taps of its own, nested and not, and one under none; then one backward."""
    found = []
    for way in WAYS:
        model = training(MODELS[name](), way)
        with tap(model, halved):
            first = model(**batch(name)).logits
            with tap(model, shifted):
                second = model(**batch(name, 1)).logits
        with tap(model, shifted, kind="self"):
            third = model(**batch(name, 2)).logits
        fourth = model(**batch(name, 3)).logits
        (first.square() + 2 * second.square() + 3 * third.square() + fourth.square()).mean().backward()
        found.append(gradients(model))
    alike(found)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_backward_inside_of_the_tap_and_of_another_is_the_same(name: str) -> None:
    found = []
    for way in WAYS:
        model = training(MODELS[name](), way)
        with tap(model, halved):
            model(**batch(name)).logits.square().mean().backward()
            kept = model(**batch(name, 1)).logits.square().mean()
        with tap(model, shifted):
            kept.backward()
        found.append(gradients(model))
    alike(found)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
@pytest.mark.parametrize("inside", [True, False])
def test_recorded_calls_get_their_gradients_once(name: str, inside: bool) -> None:
    found = []
    for way in WAYS:
        model = training(MODELS[name](), way)
        with record(model, gradients=True) as calls:
            score = model(**batch(name)).logits.square().mean()
            if inside:
                score.backward()
        if not inside:
            score.backward()
        assert len({id(call.site.module) for call in calls}) == len(calls)
        found.append({call.site.path: call.weight_gradients() for call in calls})
    alike(found)


def interventions(model: Any, name: str) -> AbstractContextManager[None]:
    return {
        "boost": lambda: boost(model, slice(2, 5), 3.0),
        "calibrate": lambda: calibrate(model, 0.2, alpha=1.1),
        "juice": lambda: juice(model, {(0, 1): 2.0, (1, 2): -1.0}),
        "perturb": lambda: perturb(model, 0.4),
        "redistribute": lambda: redistribute(
            model, slice(1, 5), 0.6, sink_dims=list(range(32)), threshold=2.4, centric=0.1, least=0.1
        ),
        "scaled": lambda: scaled(model, {(0, 1): 0.0, (1, 2): 2.0}),
        "steer": lambda: steer(model, {(1, 2): torch.linspace(-1, 1, 8)}),
    }[name]()


# juice runs the model first without gradients, where torch warns of a checkpoint that will have none.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ["boost", "calibrate", "juice", "perturb", "redistribute", "scaled", "steer"])
def test_interventions_hold_in_the_second_run(name: str) -> None:
    """Two passes before one backward: what an intervention remembers of a pass is that pass's."""
    found, plain = [], []
    for way in WAYS:
        model = training(tiny("llama"), way)
        with interventions(model, name):
            one, two = (model(prompt(2, 9, seed=seed)).logits for seed in (4, 5))
        (one.square() + two.square()).mean().backward()
        found.append(gradients(model))
    alike(found)
    model = training(tiny("llama"), None)
    sum(model(prompt(2, 9, seed=seed)).logits.square().mean() for seed in (4, 5)).backward()
    plain = gradients(model)
    assert max(float((plain[key] - own).abs().max()) for key, own in found[0].items()) > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_ran_outside_of_the_tap_is_not_changed_by_it(reentrant: bool) -> None:
    model = training(tiny("llama"), reentrant)
    loss = model(prompt(1, 6)).logits.mean()
    with tap(model, halved), pytest.raises(ValueError, match="call backward outside of the tap"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_that_tell_nobody_are_refused(reentrant: bool) -> None:
    model = training(tiny("llama"), None)
    hidden = torch.randn(1, 5, 32, requires_grad=True)
    layer, place = model.model.layers[0], model.model.rotary_emb(hidden, torch.arange(5)[None])

    def run(given: Tensor) -> Tensor:
        return layer(given, position_embeddings=place)

    with tap(model, halved), pytest.raises(ValueError, match="transformers' gradient checkpointing"):
        checkpoint(run, hidden, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_a_dropped_graph_takes_its_calls_with_it(reentrant: bool, backward: bool) -> None:
    gc.freeze()  # what was there before is not looked through
    model = training(tiny("llama"), reentrant)
    with record(model, gradients=True) as calls:
        loss = model(prompt(1, 6)).logits.sum()
    kept = [weakref.ref(each) for call in calls for each in (call, call.output)]
    if backward:
        loss.backward()
    del calls, loss
    gc.collect()
    assert not any(each() is not None for each in kept)


def test_the_checkpoint_function_is_the_models_own_again() -> None:
    model = training(tiny("llama"), False)
    own = [each.__dict__.get("_gradient_checkpointing_func") for each in model.modules()]
    with tap(model, halved), tap(model, shifted):
        model(prompt(1, 4))
    assert own == [each.__dict__.get("_gradient_checkpointing_func") for each in model.modules()]
    assert any(own)
