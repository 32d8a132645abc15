"""An order by chance: what every attribution has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.base import Attributed, Attribution
from manyheads.explain.attributions.feed import Feed, Position, Target


class Chance(Attribution):
    """a_j uniform in [0, 1), the same for the same seed and a row's real tokens, whatever else is in the batch. Shapes:
    [b, n], or a dict by stream."""

    def __init__(self, model: nn.Module, *, seed: int = 0, **shared: Any):
        super().__init__(model, **shared)
        self.seed = seed

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        trace = self.trace(feed, target, position)
        return trace.finish({stream: self._drawn(real) for stream, real in trace.real.items()})

    def _drawn(self, real: Tensor) -> Tensor:
        found = torch.zeros(real.shape)
        for row, own in enumerate(real.cpu()):
            generator = torch.Generator().manual_seed(self.seed)
            found[row, own] = torch.rand(int(own.sum()), generator=generator)
        return found.to(real.device)
