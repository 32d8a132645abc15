"""A tiny diffusion transformer, and one pass of it with what attention did before an intervention and after it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from manyheads.hosts.taps import record
from manyheads.models import DiffusionConfig, DiffusionTransformer
from manyheads.models.flow import Step
from manyheads.tasks.two_digits import WORDS

CAPTIONS = ["a 3 left of a 7", "a 2", "a 5 above a 1"]


def tiny() -> DiffusionTransformer:
    torch.manual_seed(0)
    config = DiffusionConfig(
        words=WORDS,
        image_size=8,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        frequencies=4,
    )
    model = DiffusionTransformer(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def before_and_after(
    model: DiffusionTransformer,
    change: AbstractContextManager[Any],
    kind: str,
    captions: Sequence[str] = CAPTIONS,
    index: int = 0,
) -> tuple[Any, Any]:
    """The first layer's call of the kind, as the model makes it and as the intervention leaves it, in one pass of a guided step
    of 4; rows 0 to b - 1 read no caption."""
    ids, mask = model.encode(["" for _ in captions] + list(captions))
    count = len(captions)
    step = Step(index, 4, 1 - index / 4, 0.75 - index / 4, ids[count:], mask[count:], True)
    x = torch.randn(count, 1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), record(model, kind=kind, layers=[0]) as before, change:
        with record(model, kind=kind, layers=[0]) as after, model.told(step):
            model.velocities(torch.cat([x, x]), step.time, ids, mask)
    return before[-1], after[-1]
