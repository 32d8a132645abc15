"""Taps that are left in another order than they were opened, or asked for by several threads, leave nothing behind."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch.testing import assert_close

from manyheads.explain.attributions import METHODS, InputGradient, Relevance
from manyheads.hosts.taps import record


@pytest.mark.parametrize("first", ["whole", "part"])
@pytest.mark.parametrize("leaves", [0, 1])
def test_a_model_and_a_part_of_it_are_left_in_any_order(first: str, leaves: int) -> None:
    model, ids = tiny("llama"), prompt(1, 5)
    configs = [module.__dict__.get("config") for module in model.modules()]
    taps = [record(model), record(model.model)][:: 1 if first == "whole" else -1]
    calls = [each.__enter__() for each in taps]
    with torch.no_grad():
        model(ids)
    taps.pop(leaves).__exit__(None, None, None)
    with torch.no_grad():
        model(ids)
    taps[0].__exit__(None, None, None)
    assert sorted(map(len, calls)) == [3, 6]
    assert all(a is b for a, b in zip(configs, (each.__dict__.get("config") for each in model.modules()), strict=True))


@pytest.mark.parametrize("leaves", [0, 1])
def test_what_is_compiled_afterwards_is_compiled(leaves: int) -> None:
    import torch._dynamo  # a process that compiles

    taps, graphs = [record(tiny("llama")), record(tiny("gpt2"))], []
    for each in taps:
        each.__enter__()
    taps.pop(leaves).__exit__(None, None, None)
    twice = torch.compile(lambda x: 2 * x, backend=lambda graph, _: graphs.append(graph) or graph)
    twice(torch.ones(2))
    assert not graphs  # the other tap is open
    taps[0].__exit__(None, None, None)
    twice(torch.ones(2))
    assert len(graphs) == 1


def test_several_threads_explain_one_model() -> None:
    model, ids = tiny("llama").train(), prompt(1, 12)
    wanted, found, broken = Relevance(model).attribute(ids, 5), [], []

    def explain() -> None:
        try:
            found.extend([Relevance(model).attribute(ids, 5) for _ in range(3)])
        except Exception as error:
            broken.append(error)

    threads = [Thread(target=explain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    for own in found:
        assert_close(own, wanted, atol=0, rtol=0)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["relevance", "input-gradient", "integrated-gradients", "logit-flow", "grad-cam"])
def test_in_inference_mode_an_explanation_is_what_it_is_outside(name: str) -> None:
    model, ids = tiny("llama"), prompt(1, 6)
    wanted = METHODS[name](model, None).attribute(ids, 5)
    with torch.inference_mode():
        vectors = model.get_input_embeddings()(ids)
        given = METHODS[name](model, None).attribute(ids.clone(), 5)
    assert_close(given, wanted, atol=1e-6, rtol=1e-5)
    if "gradient" in name:
        assert_close(METHODS[name](model, None).attribute({"inputs_embeds": vectors}, 5), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", ["Paris", [[1]], None, 1.5])
def test_a_target_that_is_no_number_is_refused_by_name(target: Any) -> None:
    with pytest.raises(ValueError, match="target"):
        InputGradient(tiny("llama")).attribute(prompt(1, 5), target)
