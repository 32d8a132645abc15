"""Attention entropy maximisation: a loss against attention that rests on a few instances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.mechanism import Mechanism, Result


def negative_attention_entropy(weights: Tensor) -> Tensor:
    """Mean over heads and rows of sum_j a_j ln a_j: add it, times a factor, to the loss of the task.

    weights: [..., m], as a mechanism returns them. 0 where all weight is on one key, -ln m where it is even. Rows
    without any weight (nothing to attend to) do not count. Rows that do not sum to 1 (linear attention without a
    normaliser, a gate) are brought to it first, and negative weights count as none.

    Source: Zhang et al., AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide Image
    Classification, arXiv:2406.15303, and its released main.py, which takes one bag at a time.
    """
    positive = weights.to(torch.promote_types(weights.dtype, torch.float32)).clamp_min(0.0)
    total = positive.sum(-1, keepdim=True)
    share = positive / total.masked_fill(total == 0, 1.0)
    # A key that is left out has share 0 and no part in the sum; as 1 its logarithm has a finite gradient.
    safe = share.masked_fill(share == 0, 1.0)
    return (safe * safe.log()).sum() / (total > 0).sum().clamp_min(1)


class EntropyMaximised(nn.Module):
    """A mechanism whose result carries `losses["attention_entropy"]` in training, negative_attention_entropy of its
    weights. Called as the mechanism is; in eval mode it is the mechanism. Raises ValueError for one without weights."""

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        self.mechanism = mechanism

    def forward(self, x: Tensor, context: Any = None, *, need_weights: bool = False, **options: Any) -> Result:
        result: Result = self.mechanism(x, context, need_weights=need_weights or self.training, **options)
        if not self.training:
            return result
        if result.weights is None:
            raise ValueError(f"EntropyMaximised: {self.mechanism.card.name} has no attention weights")
        losses = {**result.losses, "attention_entropy": negative_attention_entropy(result.weights)}
        return Result(result.output, result.weights if need_weights else None, losses)
