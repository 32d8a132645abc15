"""Decoding drops one entry at a time in a way of its own: it must be the general way's result, and be taken."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_families import prompt, shallow
from torch import Tensor

from manyheads.shrink import H2O, TOVA, KeyNorm, Policy, StreamingLLM, compress

POLICIES: list[Policy] = [
    StreamingLLM(budget_tokens=8, sink_size=2),
    StreamingLLM(compression_ratio=0.5, sink_size=3),
    StreamingLLM(budget_tokens=8, sink_size=0),
    StreamingLLM(budget_tokens=8, sink_size=2, positions="text"),
    KeyNorm(budget_tokens=8),
    KeyNorm(compression_ratio=0.4),
    TOVA(budget_tokens=8),
    TOVA(compression_ratio=0.5, shared=True),
    H2O(budget_tokens=8),
    H2O(compression_ratio=0.5, recent_size=2),
]


def name(policy: Policy) -> str:
    return repr(policy.to_dict()) + type(policy).__name__


def decoded(policy: Policy, family: str, rows: int) -> tuple[Tensor, list[Any]]:
    """Logits of a prompt, ten tokens, a second turn and more tokens; and the slots that layers hold after each."""
    model = shallow(family)
    # No token twice: equal keys have equal norms, and which of them leaves is nobody's promise.
    draw = torch.Generator().manual_seed(5)
    tokens = torch.stack([torch.randperm(model.config.vocab_size, generator=draw)[:34] for _ in range(rows)])
    cache = policy.make_cache(model)
    logits, held = [], []
    with torch.no_grad():
        for start, stop in pairwise([0, *range(15, 22), *range(26, 35)]):
            logits.append(model(tokens[:, start:stop], past_key_values=cache).logits)
            groups = [group for layer in cache.layers for group in layer.store.groups]
            held.append([own.slots().expand(rows, len(own.heads), -1).sort(-1).values.tolist() for own in groups])
    return torch.cat(logits, 1), held


# Projections apart or in one matrix are nothing to a cache: each family has its number of rows.
@pytest.mark.parametrize(("family", "rows"), [("llama", 1), ("phi3", 3)])
@pytest.mark.parametrize("policy", POLICIES, ids=name)
def test_it_is_what_the_general_way_gives(
    policy: Policy, family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    quick = compress._replaces

    def counted(*args: Any) -> bool:
        taken.append(quick(*args))
        return taken[-1]

    monkeypatch.setattr(compress, "_replaces", counted)
    logits, held = decoded(policy, family, rows)
    assert sum(taken) > 8, "the quick way was hardly taken"
    monkeypatch.setattr(compress, "_replaces", lambda *args: False)
    wanted, kept = decoded(policy, family, rows)
    assert held == kept
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES, ids=name)
def test_one_head_of_one_row(policy: Policy) -> None:
    model, draw = shallow("llama", num_key_value_heads=1), torch.Generator().manual_seed(5)
    tokens = torch.randperm(model.config.vocab_size, generator=draw)[None, :30]
    cache = policy.make_cache(model)
    with torch.no_grad():
        for part in (tokens[:, :15], *tokens[:, 15:].split(1, 1)):
            model(part, past_key_values=cache)
    wanted = 8 if policy.compression_ratio is None else int(30 * (1 - policy.compression_ratio))
    assert cache.lengths() == [[wanted]] * 2


def test_rows_that_hold_different_tokens_have_no_common_oldest() -> None:
    """Key norms keep other tokens in every head: then a place of one head says nothing of another's."""
    model = shallow("llama")
    cache = KeyNorm(budget_tokens=8).make_cache(model)
    with torch.no_grad():
        model(prompt(2, 20), past_key_values=cache)
    assert all(group.oldest(0) is None for layer in cache.layers for group in layer.store.groups)
