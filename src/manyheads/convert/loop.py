"""Steps of training that go on where they were stopped, bit for bit.

What has been done is kept in one file every two minutes. Whatever a step draws (rows, dropout) follows from its number,
so that a run that was stopped draws the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from manyheads.convert.keeping import Keeping
from manyheads.runs.steps import Tell

KEEP_EVERY = 120.0  # seconds


def take_steps(
    model: Any,
    optimizer: Any,
    steps: int,
    learn: Callable[[int], float],
    *,
    seed: int,
    keeping: Keeping | None,
    tell: Tell,
) -> list[float]:
    """Takes the steps that are not done yet; returns their losses. learn: leaves the gradients of a step, by its
    number, and returns its loss; gradients are clipped to a norm of 1 then. ValueError where a loss is no number."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    first = keeping.load(model, optimizer) if keeping is not None else 0
    kept = time.perf_counter()
    losses = []
    for step in range(first, steps):
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + step)
            losses.append(learn(step))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"training diverged at step {step} (loss {losses[-1]}): give a smaller learning rate")
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tell(step + 1, steps, f"loss {losses[-1]:.3f}")
        if keeping is not None and time.perf_counter() - kept > KEEP_EVERY:
            keeping.save(model, optimizer.state, step + 1)
            kept = time.perf_counter()
    if keeping is not None and first < steps:
        keeping.save(model, {}, steps)
    return losses
