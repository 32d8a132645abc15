"""Models that torch.compile made, under taps; and calls by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from own_models import own, tokens
from torch.testing import assert_close

from manyheads.hosts.taps import record, tap


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def layer_by_layer(model: Any) -> Any:
    for layer in model.model.stack.layers:
        layer.compile(backend="eager")
    return model


def by_a_function(model: Any) -> Any:
    """Nothing of the model itself says that it is compiled."""
    run = torch.compile(lambda ids: model(ids), backend="eager")
    run.model = model
    return run


@pytest.mark.parametrize(
    ("layer", "compiled"),
    [("softmax", whole), ("hedgehog", in_place), ("eit", layer_by_layer), ("softmax", by_a_function)],
)
def test_a_compiled_model_is_read_and_changed_like_any_other(layer: str, compiled: Callable[[Any], Any]) -> None:
    model, ids = own(layer), tokens(1, 6)
    with torch.no_grad():
        with record(model) as wanted:
            model(ids)
        with tap(model, lambda call: torch.zeros_like(call.output)):
            silent = model(ids).logits
        fast = compiled(model)
        before = fast(ids).logits
        with record(getattr(fast, "model", fast) if compiled is by_a_function else fast) as calls:
            fast(ids)
        with tap(model, lambda call: torch.zeros_like(call.output)):
            assert_close(fast(ids).logits, silent)
        assert_close(fast(ids).logits, before, atol=0, rtol=0)
    assert len(calls) == len(wanted) == 2
    for one, two in zip(calls, wanted, strict=True):
        assert_close(one.weights(), two.weights())


def test_calls_go_by_name_as_well_as_by_number() -> None:
    model, ids = own("softmax", "hedgehog"), tokens(1, 6)
    with torch.no_grad(), record(model) as calls:
        model(ids)
        assert calls["layers.1"] is calls[1]
        assert calls["layers.0.self_attn"] is calls[0]
        assert calls[-1:] == [calls[1]]
        with pytest.raises(ValueError, match=r"'layers' names calls \[0, 1\].*layers.1.self_attn"):
            calls["layers"]
        with pytest.raises(ValueError, match=r"'ayers.1' is part of no call's path; there are \['model"):
            calls["ayers.1"]
        model(ids)
    with pytest.raises(ValueError, match=r"'layers.1' names calls \[1, 3\]"):
        calls["layers.1"]
    with record(model) as calls, pytest.raises(ValueError, match="there are no calls yet"):
        calls["layers.1"]
