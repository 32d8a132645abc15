"""A row that is padded behind its text keeps what it keeps alone: what its own last tokens look at stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorder import held
from test_nothing_to_drop import SMALL
from tiny_families import prompt, shallow

from manyheads.shrink import Finch, Policy, SimLayerKV, SnapKV

LENGTH, SHORT = 24, 15
CASES: list[Policy] = [
    *(cls(**own, budget_tokens=8) for cls, own in SMALL.items() if "filters" not in own),
    *(cls(**own, compression_ratio=0.5) for cls, own in SMALL.items() if cls.__name__ in ("TOVA", "SnapKV")),
    SnapKV(budget_tokens=8, window_size=3, when="both", interval=2),
    Finch(budget_tokens=8, window_size=[4, 2]),
    SimLayerKV(lazy_threshold=0.2, sink_size=1, recent_size=3, last_size=2),
]


def kept(model: Any, policy: Policy, rows: int) -> tuple[list[Any], torch.Tensor]:
    """What row 0 holds after a prompt and three tokens, and their logits; beside a longer row, or alone."""
    text, more = prompt(2, LENGTH)[:rows], prompt(2, 3, seed=5)[:rows]
    padding = torch.ones(rows, LENGTH + 3, dtype=torch.long)
    if rows == 1:
        text, padding = text[:, :SHORT], padding[:, : SHORT + 3]
    else:
        padding[0, SHORT:LENGTH] = 0
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    cache, logits, n = policy.make_cache(model), [], text.shape[1]
    with torch.no_grad():
        model(text, attention_mask=padding[:, :n], position_ids=positions[:, :n], past_key_values=cache)
        for i in range(3):
            told = {"attention_mask": padding[:, : n + i + 1], "position_ids": positions[:, n + i : n + i + 1]}
            logits.append(model(more[:, i : i + 1], **told, past_key_values=cache).logits[0])
    gap = n - SHORT
    found = [
        {head: [slot - gap * (slot >= SHORT) for slot in own] for (row, head), own in held(layer).items() if row == 0}
        for layer in cache.layers
    ]
    return found, torch.cat(logits)


@pytest.mark.parametrize("policy", CASES, ids=lambda own: type(own).__name__)
def test_as_alone(policy: Policy) -> None:
    model = shallow("llama")
    alone = policy
    if policy == CASES[-2]:
        alone = Finch(budget_tokens=8, window_size=4)
    wanted, given = kept(model, alone, 1), kept(model, policy, 2)
    assert given[0] == wanted[0]
    torch.testing.assert_close(given[1], wanted[1], atol=1e-5, rtol=1e-5)
