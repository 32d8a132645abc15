"""One model, several threads: no call is given another's cache. What threads do at any moment is done here at one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_nothing_to_drop import SMALL
from tiny_families import prompt, shallow

from manyheads.shrink import FastKVzip, Full, KVzip
from manyheads.shrink.policy import Active


class Elsewhere(Active):
    """Another thread has told of its own cache whenever this one looks."""

    theirs: Any = None
    cache = property(lambda self: self.theirs, lambda self, own: None)  # type: ignore[assignment]


def test_a_call_is_given_its_own_cache() -> None:
    model, tokens = shallow("llama"), prompt(1, 12)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(tokens, **settings)
    with Full()(model) as active:
        active.__class__, active.theirs = Elsewhere, Full().make_cache(model)  # type: ignore[attr-defined]
        assert model(tokens).past_key_values is not active.theirs  # type: ignore[attr-defined]
        torch.testing.assert_close(model.generate(tokens, **settings), wanted)
        assert active.theirs.get_seq_length() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", [KVzip, FastKVzip])
def test_hooks_that_come_and_go_meanwhile(cls: Any) -> None:
    """PyTorch tells a hook no kwargs just before it is registered, and just after it is removed."""
    model = shallow("llama")
    cache = cls(**SMALL[cls], budget_tokens=8).make_cache(model)
    out = model(prompt(1, 4), use_cache=False)
    before, after = 0, 0
    for module in model.modules():
        for hook in list(module._forward_hooks.values()):
            after += hook(module, (), out) is None
        for key, hook in list(module._forward_pre_hooks.items()):
            if module is not model:
                before += hook(module, ()) is None
                assert key in module._forward_pre_hooks_with_kwargs
    assert (before, after) == (2 if cls is FastKVzip else 0, 1)
    assert cache.get_seq_length() == 0
