"""The MLP of `primitives` while its router is trained. In a file of its own, read when a mixture is made: it stands on
transformers, which no command line waits for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyheads.models.feed_forward import ExpertMLP

NOISE = 0.5


class PrimitiveMLP(ExpertMLP):
    """An MLP's router and two experts while they are trained; afterwards it is an ExpertMLP."""

    latencies: tuple[float, float]

    def forward(self, x: Tensor, kinds: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        rows = x.flatten(0, -2)
        scores = self._scores(rows)
        chosen = (self._noisy(scores) if self.training else scores).argmax(-1)
        shares = scores.softmax(-1).gather(1, chosen[:, None])
        shares = shares / shares.detach()
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, row, expert(rows[row]) * shares[row].to(rows.dtype))
        return self.norm_after(out.view_as(x))

    def losses(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """mask: [b, n], of real tokens, or a dense one, which does not say what is real."""
        scores = self._scores(self.norm(x))
        real = mask if mask is not None and mask.ndim == 2 else torch.ones(scores.shape[:2], device=x.device)
        return [balance(scores, self._noisy(scores), real.to(scores.dtype), self.latencies)]

    def _noisy(self, scores: Tensor) -> Tensor:
        return scores + NOISE * torch.randn_like(scores)


def balance(scores: Tensor, noisy: Tensor, real: Tensor, latencies: tuple[float, float]) -> Tensor:
    """scores and noisy [b, n, 2], real [b, n] of ones and zeros -> the loss of `primitives`."""
    costs = scores.new_tensor(latencies)
    odds = 0.5 * (1 + torch.erf((scores - noisy.flip(-1)) / (NOISE * math.sqrt(2))))
    loads = [(each * real[..., None]).sum((0, 1)) * costs for each in (scores.softmax(-1), odds)]
    return torch.stack([load.var() / load.mean().square() for load in loads]).sum()
