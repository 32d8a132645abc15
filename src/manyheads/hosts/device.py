"""Where a model's weights are, and keeping them as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout while inside. Each part then trains as before: a tower or an adapter may do so by itself."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Parameters that get no gradient, and no dropout, while inside."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def device_of(model: Any) -> torch.device:
    """Where a model takes its inputs. Offloaded weights (accelerate) lie on no device between calls, and its hooks
    bring inputs to where they are run."""
    found: torch.device = next(model.parameters()).device
    return torch.device("cpu") if found.type == "meta" and hasattr(model, "_hf_hook") else found
