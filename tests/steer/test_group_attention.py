"""InstaManip's groups: the whole model under an explicit mask, in a prompt and while decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from manyheads.hosts.loading import load_model
from manyheads.steer.group_attention import group_attention
from manyheads.steer.method import Prompt, method

IDS = torch.arange(2 * 14).view(2, 14).mul(37) % 200 + 30


def masked(model: Any, ids: torch.Tensor) -> torch.Tensor:
    n = ids.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    for i in range(n):
        for j in range(n):
            if i > 8 and 1 <= j < 6:
                seen[i, j] = False
    logits: torch.Tensor = model(ids, attention_mask=seen.expand(2, 1, n, n)).logits
    return logits


def test_what_applies_does_not_see_the_examples() -> None:
    model = load_model().model.double()
    with torch.no_grad():
        wanted, whole = masked(model, IDS), model(IDS).logits
        with group_attention(model, slice(1, 6), [6, 7, 8]):
            found = model(IDS).logits
            cache = model(IDS[:, :11]).past_key_values
            later = [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(11, 14)]
    assert_close(found, wanted)
    assert_close(torch.cat(later, 1), wanted[:, 11:])
    assert_close(found[:, :9], whole[:, :9])
    assert float((found - whole)[:, 9:].abs().max()) > 1e-3


def test_neutral_is_the_model_and_order_is_checked() -> None:
    model, own = load_model().model, method("group_attention")
    prompt = Prompt({"input_ids": IDS}, {"text1": range(1, 6), "text2": range(6, 9)})
    with torch.no_grad():
        wanted = model(IDS).logits
        with own.open(model, prompt, **own.neutral):
            assert torch.equal(model(IDS).logits, wanted)
        with own.open(model, prompt), group_attention(model, [], [3]):
            assert not torch.equal(model(IDS).logits, wanted)
        with group_attention(model, [5], [4]), pytest.raises(ValueError, match="after the exemplars"):
            model(IDS)
    with pytest.raises(ValueError, match="hidden"), group_attention(model, [1], [2], 1.5):
        pass
