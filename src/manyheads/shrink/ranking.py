"""The best entries of every head."""

from __future__ import annotations

import torch
from torch import Tensor


def best_of(scores: Tensor, targets: Tensor) -> Tensor:
    """[b, g, m] True at the targets [b or 1, g] highest scores of each head."""
    held = scores.shape[2]
    most, drop = min(int(targets.max()), held), max(0, held - int(targets.min()))
    if drop < most:
        # Decoding drops one or a few of many: look for the worst instead of ranking the best.
        worst = scores.topk(drop, dim=-1, largest=False).indices
        chosen = torch.arange(drop, device=scores.device) >= held - targets[..., None]
        return torch.ones_like(scores, dtype=torch.bool).scatter(2, worst, chosen.expand(worst.shape))
    best = scores.topk(most, dim=-1).indices
    chosen = torch.arange(most, device=scores.device) < targets[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, chosen.expand(best.shape))
