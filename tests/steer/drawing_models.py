"""A tiny diffusion transformer, one shaped as a UNet, and what attention did before an intervention and after it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from manyheads.hosts.taps import record
from manyheads.models import DiffusionConfig, DiffusionTransformer
from manyheads.models.flow import Flow, Step
from manyheads.registry import mechanism_class
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
    """The first layer's call of the kind, as the model makes it and as the intervention leaves it, in one pass of a
    guided step of 4; rows 0 to b - 1 read no caption."""
    ids, mask = model.encode(["" for _ in captions] + list(captions))
    count = len(captions)
    step = Step(index, 4, 1 - index / 4, 0.75 - index / 4, ids[count:], mask[count:], True)
    x = torch.randn(count, 1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    with (
        torch.no_grad(),
        record(model, kind=kind, layers=[0]) as before,
        change,
        record(model, kind=kind, layers=[0]) as after,
        model.told(step),
    ):
        model.velocities(torch.cat([x, x]), step.time, ids, mask)
    return before[-1], after[-1]


class TinyUNet(Flow, nn.Module):
    """Self and cross attention at two resolutions, 8 x 8 tokens, 4 x 4 below them, and 8 x 8 again: shaped as a UNet,
    and nothing that its interventions could know of the transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.config = SimpleNamespace(image_size=8, num_channels=1)
        self.device, self.dtype = torch.device("cpu"), torch.double
        self.inward, self.outward, self.words = nn.Linear(1, 8), nn.Linear(8, 1), nn.Embedding(len(WORDS), 8)
        softmax = mechanism_class("softmax")
        for name in ("down", "middle", "up"):
            self.add_module(f"{name}_self", softmax(8, 2))
            self.add_module(f"{name}_cross", softmax(8, 2))
        self.double().eval()

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [[WORDS.index(word) for word in ["<start>", *caption.split()]] for caption in captions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]

    def forward(self, x: torch.Tensor, time: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        words = self.words(ids)

        def block(name: str, tokens: torch.Tensor) -> torch.Tensor:
            tokens = tokens + getattr(self, f"{name}_self")(tokens).output
            return tokens + getattr(self, f"{name}_cross")(tokens, words, mask=mask).output

        high = block("down", self.inward(x.flatten(2).transpose(1, 2)) + time[:, None, None])
        low = F.avg_pool2d(high.transpose(1, 2).unflatten(2, (8, 8)), 2).flatten(2).transpose(1, 2)
        back = F.interpolate(block("middle", low).transpose(1, 2).unflatten(2, (4, 4)), scale_factor=2)
        top = block("up", high + back.flatten(2).transpose(1, 2))
        return SimpleNamespace(velocity=self.outward(top).transpose(1, 2).unflatten(2, (8, 8)))
