"""Attention entropy maximisation: a loss against attention that rests on a few instances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.mechanism import Mechanism, Result
from manyheads.training.given import check_mechanism_given, innermost


def negative_attention_entropy(weights: Tensor, *, queries: Tensor | None = None) -> Tensor:
    """Mean over heads and rows of sum_j a_j ln a_j: add it, times a factor, to the loss of the task.

    weights: [..., m], as a mechanism returns them. 0 where all weight is on one key, -ln m where it is even. Rows
    without any weight (nothing to attend to) do not count. Rows that do not sum to 1 (linear attention without a
    normaliser, a gate) are brought to it first, and negative weights count as none. queries: [b, n] bool, True = counts
    (padded queries do not), of weights [b, heads, n, m].

    Source: Zhang et al., AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide Image
    Classification, arXiv:2406.15303, and its released main.py, which takes one bag at a time.
    """
    positive = weights.to(torch.promote_types(weights.dtype, torch.float32)).clamp_min(0.0)
    total = positive.sum(-1, keepdim=True)
    share = positive / total.masked_fill(total == 0, 1.0)
    # A key that is left out has share 0 and no part in the sum; as 1 its logarithm has a finite gradient.
    safe = share.masked_fill(share == 0, 1.0)
    counted = total > 0 if queries is None else (total > 0) & queries[:, None, :, None]
    return (safe * safe.log()).masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1)


class EntropyMaximised(nn.Module):
    """A mechanism, or a wrapper around one, whose result carries `losses["attention_entropy"]` in training,
    negative_attention_entropy of its weights, without padded queries. Called as the mechanism is; in eval mode it is
    the mechanism. Raises ValueError for one without weights."""

    def __init__(self, mechanism: Mechanism | nn.Module) -> None:
        super().__init__()
        check_mechanism_given("EntropyMaximised", innermost(mechanism))
        self.mechanism = mechanism

    def forward(
        self, x: Tensor, context: Any = None, *, mask: Any = None, need_weights: bool = False, **options: Any
    ) -> Result:
        result: Result = self.mechanism(x, context, mask=mask, need_weights=need_weights or self.training, **options)
        if not self.training:
            return result
        if result.weights is None:
            raise ValueError(f"EntropyMaximised: {innermost(self.mechanism).card.name} has no attention weights")
        # In self attention the padding of keys is that of the queries too.
        real = mask.flatten(1) if context is None and isinstance(mask, Tensor) and mask.ndim > 1 else None
        b, n = result.weights.shape[0], result.weights.shape[-2]
        if real is None or mask.shape != result.output.shape[:-1] or real.shape != (b, n):
            real = None
        loss = negative_attention_entropy(result.weights, queries=real)
        losses = {**result.losses, "attention_entropy": loss}
        return Result(result.output, result.weights if need_weights else None, losses)
