"""Where a model's weights are, and keeping them as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Parameters that get no gradient, and no dropout, while inside."""
    wanted, training = [p for p in model.parameters() if p.requires_grad], model.training
    for parameter in wanted:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


def device_of(model: Any) -> torch.device:
    found: torch.device = next(model.parameters()).device
    return found
