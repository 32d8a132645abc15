"""Attention entropy maximisation: a loss against attention that rests on a few instances."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manyheads.mechanism import Mechanism, Result


def negative_attention_entropy(weights: Tensor) -> Tensor:
    """Mean over heads and rows of sum_j a_j ln a_j: add it, times a factor, to the loss of the task.

    weights: [..., m], as a mechanism returns them. 0 where all weight is on one key, -ln m where it is even. Rows
    without any weight (nothing to attend to) do not count.

    Source: Zhang et al., AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide Image
    Classification, arXiv:2406.15303, and its released main.py, which takes one bag at a time.
    """
    # A key that is left out has weight 0 and no part in the sum; as 1 its logarithm has a finite gradient.
    safe = weights.masked_fill(weights <= 0, 1.0)
    rows = (safe * safe.log()).sum(-1)
    return rows.sum() / (weights > 0).any(-1).sum().clamp_min(1)


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
