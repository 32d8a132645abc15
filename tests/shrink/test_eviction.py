"""With entries dropped the ragged cache is a dense one whose heads are shown the same entries."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from recorder import feed, feed_dense, recording
from tiny_families import FAMILIES, prompt, shallow
from torch import Tensor

from manyheads.shrink import H2O, TOVA, AdaKV, Duo, KeyNorm, Policy, PyramidKV, SnapKV, StreamingLLM
from manyheads.shrink.compress import View

POLICIES: list[Policy] = [
    StreamingLLM(budget_tokens=7, sink_size=2, positions="text"),
    KeyNorm(compression_ratio=0.5),
    TOVA(budget_tokens=6, interval=3),
    H2O(budget_tokens=6),
    H2O(compression_ratio=0.6, when="decode"),
    SnapKV(budget_tokens=7, window_size=3, kernel_size=3),
    SnapKV(compression_ratio=0.6, window_size=2, kernel_size=3, allocation=AdaKV(floor=0.1)),
    KeyNorm(budget_tokens=8, allocation=PyramidKV(beta=4)),
    TOVA(budget_tokens=6, allocation=AdaKV(), when="both"),
    Duo(gates=[[0.9, 0.1], [0.2, 0.8]], sink_size=2, recent_size=4, compression_ratio=0.5),
    Duo(gates=[[0.9, 0.1], [0.2, 0.8]], sink_size=2, recent_size=3, budget_tokens=7),
]
ENDS = [14, 15, 16, 17, 21, 22, 23]


def name(policy: Policy) -> str:
    return "-".join([type(policy).__name__, *(type(policy.allocation).__name__,) * (policy.allocation is not None)])


@pytest.mark.parametrize("policy", POLICIES, ids=name)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_logits_are_those_of_a_dense_cache_with_the_same_mask(family: str, policy: Policy) -> None:
    check(family, policy, ENDS, padding_of(2, 23, [0, 5]))


@pytest.mark.parametrize("family", [own for own in FAMILIES if own not in ("gpt2", "gpt_neox")])
def test_every_family(family: str) -> None:
    check(family, TOVA(budget_tokens=5), ENDS, padding_of(2, 23, [0, 5]))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_families_without_grouped_heads(family: str) -> None:
    check(family, SnapKV(budget_tokens=6, window_size=2, allocation=AdaKV()), ENDS, padding_of(2, 23, [0, 5]))


@dataclass(kw_only=True)
class Scattered(Policy):
    """Any entries, any number of them per head: what a policy might do at its worst."""

    seed: int = 0

    def score(self, view: View) -> Tensor:
        heads = view.group.index[:, None] * 7.13 + view.layer * 3.7 + self.seed
        return torch.sin(view.slots * 12.9898 + heads * 78.233 + view.total) * 43.7 % 1

    def targets(self, mean: Tensor, layer: Any, heads: int) -> Tensor:
        spread = [(layer.index * 5 + head * 3 + self.seed) % 4 for head in range(heads)]
        return (mean[:, None] * torch.tensor(spread) / 1.5).long()


@pytest.mark.parametrize("seed", range(16))
def test_random_policies_paddings_and_call_patterns(seed: int) -> None:
    draw = random.Random(seed)
    family = draw.choice(["llama", "gemma2", "qwen2", "gpt2"])
    length = draw.randint(12, 24)
    cuts = sorted(draw.sample(range(1, length), draw.randint(1, length - 2)))
    budget: dict[str, Any] = draw.choice(
        [{"compression_ratio": draw.random()}, {"budget_tokens": draw.randint(1, 9)}, {"budget_bytes": 9000}]
    )
    moment = {"when": draw.choice(["prefill", "decode", "both"]), "interval": draw.randint(1, 4)}
    rows = draw.randint(1, 3)
    padding = padding_of(rows, length, [draw.randint(0, min(cuts[0], 6)) for _ in range(rows)])
    check(family, Scattered(seed=seed, **budget, **moment), [*cuts, length], padding)


def padding_of(rows: int, length: int, left: list[int]) -> Tensor:
    padding = torch.ones(rows, length, dtype=torch.long)
    for row, count in enumerate(left):
        padding[row, :count] = 0
    return padding


def check(family: str, policy: Policy, ends: list[int], padding: Tensor) -> None:
    model = shallow(family)
    tokens = prompt(*padding.shape)
    cache = policy.make_cache(model)
    with recording() as steps:
        given = feed(model, cache, tokens, padding, ends)
    wanted = feed_dense(model, steps, tokens, padding, ends)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    assert max(max(own) for own in cache.lengths()) <= padding.shape[1]


@pytest.mark.parametrize("policy", POLICIES[:4], ids=name)
def test_rows_of_a_batch_do_not_touch_each_other(policy: Policy) -> None:
    model = shallow("llama")
    tokens, padding = prompt(2, 23), padding_of(2, 23, [0, 5])
    policy.interval = 1
    both = feed(model, policy.make_cache(model), tokens, padding, ENDS)
    alone = feed(model, policy.make_cache(model), tokens[1:, 5:], padding[1:, 5:], [end - 5 for end in ENDS])
    # Row after row within each pass: the second row's are the last of every pass.
    picked, at, start = [], 0, 0
    for end in ENDS:
        counts = padding[:, start:end].sum(1).tolist()
        picked.append(both[at + counts[0] : at + sum(counts)])
        at, start = at + sum(counts), end
    torch.testing.assert_close(torch.cat(picked), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "policy", [POLICIES[9], StreamingLLM(budget_tokens=6, sink_size=2, positions="text")], ids=name
)
def test_what_a_streaming_head_sees_of_a_prompt_and_after_it(policy: Policy) -> None:
    """As their docstrings say: a first pass sees all of itself, a later token sinks and recent ones with itself among
    them, and before a pass of several tokens there is room for all of them."""
    model, ends = shallow("llama"), [14, 15, 18]
    with recording() as steps:
        feed(model, policy.make_cache(model), prompt(1, 18), padding_of(1, 18, [0]), ends)
    streaming = 1 if isinstance(policy, Duo) else 0  # of layer 0
    seen = [step.during[0, streaming] for step in steps[0]]
    assert seen == [list(range(14)), [0, 1, 11, 12, 13, 14], [0, 1, 14, 15, 16, 17]]
