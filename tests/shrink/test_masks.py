"""Masks that differ from row to row and from turn to turn: what the plain model gives for the same call."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from recorder import recording, show_only
from tiny_families import FAMILIES, prompt, shallow
from torch import Tensor
from transformers import DynamicCache

from manyheads.hosts.visibility import Visibility
from manyheads.shrink import H2O, TOVA, AdaKV, Full, KeyNorm, Policy, SnapKV, StreamingLLM, release

# Where the documents of each row begin.
CUTS = ((0, 4, 9), (0, 6), (0, 1, 2, 11))


def packed(length: int) -> Tensor:
    """Position ids of rows that hold several documents one after the other."""
    places = torch.arange(length)
    return torch.stack([places - torch.tensor([max(c for c in row if c <= i) for i in range(length)]) for row in CUTS])


@pytest.mark.parametrize("use_cache", [False, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_packed_into_rows(family: str, use_cache: bool | None) -> None:
    model, tokens = shallow(family), prompt(3, 14)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(tokens, position_ids=packed(14), use_cache=use_cache).logits

    wanted = logits()
    for policy in (Full(), TOVA(budget_tokens=64)):
        with policy(model):
            torch.testing.assert_close(logits(), wanted, atol=1e-5, rtol=1e-5)
    alone = shallow(family)(tokens[:1, :4], use_cache=False).logits
    torch.testing.assert_close(wanted[:1, :4], alone, atol=1e-5, rtol=1e-5)


def test_a_rule_by_rows_follows_its_rows() -> None:
    """Beams and chosen rows take their part of the rule along."""
    cut = torch.tensor([1, 3, 5])
    seen = Visibility(lambda b, h, i, j: (j <= i) & (j >= cut[b]), None, 0, plain=False, rows=torch.arange(3))
    slots = torch.arange(6)[None, None]
    allowed = seen.allowed(slice(0, 6), slots)
    order = torch.tensor([2, 0, 0])
    torch.testing.assert_close(seen.on_batch(lambda row: row[order]).allowed(slice(0, 6), slots), allowed[order])
    assert allowed.sum((1, 2, 3)).tolist() == [15, 6, 1]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "llama"])
def test_another_cache_beside_an_attached_model(family: str) -> None:
    model, tokens = shallow(family), prompt(2, 20)

    def passes() -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        ends = (0, 11, 12, 16, 20)
        with torch.no_grad():
            passes = (tokens[:, start:end] for start, end in itertools.pairwise(ends))
            return [model(own, past_key_values=cache).logits for own in passes]

    wanted = passes()
    Full().make_cache(model)
    torch.testing.assert_close(passes(), wanted, atol=1e-5, rtol=1e-5)


# First turn with padding on the left; the second hides tokens of the first, the third shows some of them again.
ENDS = (11, 12, 13, 19, 23, 24)


COVERING: list[Policy] = [
    Full(),
    H2O(budget_tokens=64),
    StreamingLLM(budget_tokens=64, positions="text"),
    KeyNorm(compression_ratio=0.0),
    SnapKV(budget_bytes=10**6, window_size=3),
]
EVICTING: list[Policy] = [
    StreamingLLM(budget_tokens=9, sink_size=2, positions="text"),
    H2O(budget_tokens=8),
    TOVA(budget_tokens=8, interval=3),
    KeyNorm(compression_ratio=0.5),
    SnapKV(budget_tokens=7, window_size=3, kernel_size=3, allocation=AdaKV(), when="passes"),
]


def masks() -> list[Tensor]:
    full = torch.ones(3, 24, dtype=torch.long)
    full[1, :5] = 0
    hidden = full.clone()
    hidden[0, 2:6], hidden[1, 7:9], hidden[2, :3] = 0, 0, 0
    again = hidden.clone()
    again[0, 4:6], again[2, :1] = 1, 1
    return [full[:, :11], full[:, :12], full[:, :13], hidden[:, :19], hidden[:, :23], again]


def talk(model: Any, cache: Any) -> Tensor:
    tokens, positions, start, logits = prompt(3, 24), torch.arange(24), 0, []
    for mask, end in zip(masks(), ENDS, strict=True):
        with torch.no_grad():
            out = model(
                tokens[:, start:end],
                attention_mask=mask,
                position_ids=positions[None, start:end].expand(3, -1),
                past_key_values=cache,
            )
        logits.append(out.logits[mask[:, start:end].bool()])
        start = end
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_that_hides_tokens_of_an_earlier_one(family: str) -> None:
    model = shallow(family)
    wanted = talk(model, DynamicCache(config=model.config))
    # What a family does to masks is the same for all: with and without windows every policy is asked.
    for policy in COVERING if family in ("llama", "gemma2") else (COVERING[0], COVERING[-1]):
        torch.testing.assert_close(talk(model, policy.make_cache(model)), wanted, atol=1e-5, rtol=1e-5)
        release(model)


@pytest.mark.parametrize("policy", EVICTING, ids=lambda own: type(own).__name__)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_oss"])
def test_hidden_tokens_where_others_are_dropped(family: str, policy: Policy) -> None:
    model = shallow(family)
    cache = policy.make_cache(model)
    with recording() as steps:
        given = talk(model, cache)
    show_only(model, steps)
    torch.testing.assert_close(given, talk(model, DynamicCache(config=model.config)), atol=1e-5, rtol=1e-5)
    assert max(map(max, cache.lengths())) <= 12
