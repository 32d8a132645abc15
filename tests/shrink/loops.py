"""A policy's rule as loops over tokens in float64, against what its cache holds after every pass of a padded batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from recorder import Step, feed, feed_dense, recording
from tiny_families import tiny
from torch import Tensor
from transformers import PreTrainedModel

from manyheads.shrink import Policy, release
from manyheads.shrink.layer import RaggedLayer

ENDS = [26, 27, 28, 33, 34, 35]
LEFT = [0, 5]


@dataclass
class Now:
    """One KV head of one row in one layer, before entries leave: what it holds by slot, in the order of the text, and
    the queries of the pass, [r, n, d] from slot `since` on."""

    layer: int
    row: int
    head: int
    held: list[int]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    queries: Tensor
    since: int
    first_real: int
    seen: int
    scale: float
    decoding: bool
    # The other KV heads of the layer, this one included.
    heads: list[Now] = field(default_factory=list)

    @property
    def real(self) -> int:
        return self.seen - self.first_real

    def look(self, query: Tensor, own: int) -> dict[int, float]:
        """Attention of one query at slot `own` over what is held."""
        scores = {slot: float(query @ self.keys[slot]) * self.scale for slot in self.held if slot <= own}
        top = max(scores.values())
        total = sum(math.exp(value - top) for value in scores.values())
        return {slot: math.exp(value - top) / total for slot, value in scores.items()}


# What a head keeps.
Rule = Callable[[Now], list[int]]


def best(score: dict[int, float], count: int) -> list[int]:
    return sorted(score, key=lambda slot: -score[slot])[:count]


def watched(
    model: PreTrainedModel, policy: Policy, tokens: Tensor, padding: Tensor, ends: list[int]
) -> tuple[dict[int, list[Step]], dict[int, Tensor], Tensor]:
    """Steps, values [b, g, n, d] by layer, and logits."""
    values: dict[int, list[Tensor]] = {}
    update = RaggedLayer.update
    with pytest.MonkeyPatch.context() as patch:

        def noted(self: RaggedLayer, keys: Tensor, new: Tensor, *args: Any, **kwargs: Any) -> Any:
            values.setdefault(self.index, []).append(new.double().clone())
            return update(self, keys, new, *args, **kwargs)

        patch.setattr(RaggedLayer, "update", noted)
        with recording() as steps:
            logits = feed(model, policy.make_cache(model), tokens, padding, ends)
    release(model)
    return steps, {layer: torch.cat(own, 2) for layer, own in values.items()}, logits


def moments(steps: list[Step], values: Tensor, layer: int, turn: int) -> list[list[Now]]:
    """Of one pass, by row and KV head."""
    keys, step = torch.cat([own.keys for own in steps], 2), steps[turn]
    seen = sum(own.keys.shape[2] for own in steps[: turn + 1])
    n, repeat = step.queries.shape[2], step.queries.shape[1] // step.keys.shape[1]
    found = []
    for row, first in enumerate(LEFT):
        heads = []
        for head in range(keys.shape[1]):
            held = [slot for slot in step.during[row, head] if slot >= first]
            rows = [{slot: own[row, head, slot] for slot in held} for own in (keys, values)]
            queries = step.queries[row, head * repeat : (head + 1) * repeat]
            now = Now(layer, row, head, held, *rows, queries, seen - n, first, seen, step.scale, n == 1)
            heads.append(now)
        for now in heads:
            now.heads = heads
        found.append(heads)
    return found


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """No token twice in a row: equal keys would tie. The second row is padded on the left."""
    draw = torch.Generator().manual_seed(seed)
    padding = torch.ones(2, ENDS[-1], dtype=torch.long)
    padding[1, : LEFT[1]] = 0
    return torch.stack([torch.randperm(50, generator=draw)[: ENDS[-1]] + 3 for _ in range(2)]), padding


def check(policy: Policy, rule: Rule, family: str = "llama", **changes: Any) -> None:
    """The rule says what each head keeps of what it holds, after every pass; and what is left is attended to."""
    model = tiny(family, **changes).double()
    tokens, padding = batch()
    steps, values, given = watched(model, policy, tokens, padding, ENDS)
    dropped = False
    for layer, own in steps.items():
        for turn, step in enumerate(own):
            for row, heads in enumerate(moments(own, values[layer], layer, turn)):
                for head, now in enumerate(heads):
                    kept = [slot for slot in step.after[row, head] if slot >= LEFT[row]]
                    # A policy of prefill drops from the context, which is the first pass.
                    acts = turn == 0 or policy.when != "prefill"
                    assert kept == sorted(rule(now) if acts else now.held), (layer, row, head, turn)
                    dropped = dropped or len(kept) < len(now.held)
    assert dropped
    wanted = feed_dense(tiny(family, **changes).double(), steps, tokens, padding, ENDS)
    torch.testing.assert_close(given, wanted, atol=1e-6, rtol=1e-6)
