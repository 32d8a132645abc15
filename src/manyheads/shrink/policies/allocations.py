"""Sharing out a budget: among the heads of a layer (Ada-KV), among the layers (PyramidKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manyheads.shrink.hints import Hinted


@dataclass(frozen=True, kw_only=True)
class AdaKV(Hinted):
    """Claim: heads that spread their attention need more of a layer's budget than heads that focus.

    Every head is sure of floor * mean entries, its own best; the rest of the layer's budget goes to the best scores of
    all heads together. Rows of a batch share a buffer, so they share the mean of their counts.
    Source: arXiv 2407.11550, FFY0/AdaKV (floor_alpha 0.2), batch 1.
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"AdaKV: floor is a share of the mean budget, from 0 to 1; got {self.floor}")

    def of_layer(self, mean: Tensor, layer: int, layers: int, count: Tensor) -> Tensor:
        return mean

    def of_heads(self, scores: Tensor, targets: Tensor) -> Tensor:
        b, heads, m = scores.shape
        targets = targets.expand(b, heads)
        held = scores > -torch.inf
        if bool((held.sum(-1) <= targets).all()):
            return targets
        safe = (targets * self.floor).long()
        ranks = scores.argsort(-1, descending=True).argsort(-1)
        ahead = scores.double().masked_fill(ranks < safe[..., None], torch.inf)
        total = targets.sum(-1).clamp_max(heads * m)
        best = ahead.flatten(1).argsort(-1, descending=True)
        chosen = torch.arange(heads * m, device=scores.device) < total[:, None]
        taken = torch.zeros(b, heads * m, dtype=torch.bool, device=scores.device).scatter(1, best, chosen)
        counts = (taken.view(b, heads, m) & held).sum(-1).double()
        # What a short row cannot fill stays evenly shared out: it may grow, and must not take from the longer ones.
        counts = counts + (targets.sum(-1) - counts.sum(-1))[:, None] / heads
        return counts.mean(0, keepdim=True).floor().long()


@dataclass(frozen=True, kw_only=True)
class PyramidKV(Hinted):
    """Claim: lower layers spread their attention and upper ones funnel it, so budgets should fall with depth.

    budget(l) = high - (high - low) l / (L - 1), low = mean / beta, high = 2 mean - low, so that the mean over the L
    layers is kept; where high exceeds the tokens there are, high is those and low rises. Source: arXiv 2406.02069,
    Zefan-Cai/KVCache-Factory `pyramidkv_utils.py` (beta 20), which rounds the step down and so spends a little less.
    """

    beta: float = 20.0
    across_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise ValueError(f"PyramidKV: beta must be at least 1; got {self.beta}")

    def of_layer(self, mean: Tensor, layer: int, layers: int, count: Tensor) -> Tensor:
        if layers == 1:
            return mean
        low = (mean / self.beta).clamp_min(1).minimum(mean)
        high = torch.minimum(2 * mean - low, torch.maximum(count.to(mean), mean))
        low = 2 * mean - high
        return (high - (high - low) * layer / (layers - 1)).floor()

    def of_heads(self, scores: Tensor, targets: Tensor) -> Tensor:
        return targets
