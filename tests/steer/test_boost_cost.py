"""What a boost of one row per step adds to a decode step, in operators: those are the same on a busy machine."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from manyheads.hosts.taps import record, tap
from manyheads.steer import boost


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name.removeprefix("aten::").rpartition("_for_")[0] or func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def step(model: Any, change: Any) -> Counter[str]:
    """Operators of one decode step behind a prompt of 12 tokens."""
    with change:
        past = model(prompt(1, 12), use_cache=True).past_key_values
        model(prompt(1, 1), past_key_values=past)
        with Counted() as counted:
            model(prompt(1, 1), past_key_values=past)
    return counted.found


@pytest.mark.parametrize("heads", [None, [(layer, head) for layer in range(4) for head in (0, 2)]])
def test_attention_is_computed_once_and_the_row_once_for_all_layers(heads: Any) -> None:
    model = tiny("llama", num_hidden_layers=4)
    model.set_attn_implementation("sdpa")
    plain = step(model, nullcontext())
    given = step(model, boost(model, slice(2, 6), 3.0, heads=heads))
    attention = next(name for name in plain if "scaled_dot_product" in name)
    assert plain[attention] == given[attention] == 4
    more = given.total() - plain.total()
    assert more <= 16 + 4 * 2


def test_the_cheap_row_is_the_rule() -> None:
    """Decoding with some heads boosted is the prompt read whole with them."""
    model, ids = tiny("llama", num_hidden_layers=2).double(), prompt(2, 9)
    model.set_attn_implementation("sdpa")
    change = {"heads": [(0, 1), (1, 0), (1, 2)]}
    with torch.no_grad(), boost(model, [2, 3], 4.0, **change):
        whole = model(ids).logits[:, -1]
        past = model(ids[:, :-1], use_cache=True).past_key_values
        assert_close(model(ids[:, -1:], past_key_values=past).logits[:, -1], whole)


def test_a_sole_reader_and_several_see_the_layers_own_output() -> None:
    model, ids = tiny("llama", num_hidden_layers=2).double(), prompt(1, 5)
    seen = []
    with torch.no_grad(), record(model) as alone:
        wanted = model(ids).logits
    with torch.no_grad(), record(model) as first, tap(model, lambda call: seen.append(call.output.clone())):
        assert_close(model(ids).logits, wanted, atol=0, rtol=0)
    for one, two, three in zip(alone, first, seen, strict=True):
        assert_close(one.output, two.output, atol=0, rtol=0)
        assert_close(one.output, three, atol=0, rtol=0)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="a reader returned"),
        tap(model, lambda call: call.query[:1, :1]),
    ):
        model(ids)
