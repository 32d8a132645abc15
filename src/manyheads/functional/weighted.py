"""Softmax attention that gives its weights where they are asked for, and uses PyTorch's kernel where they are not."""

from __future__ import annotations

from torch import Tensor

from manyheads.functional.grouped import attend_grouped, attend_masked, grouped_mix, grouped_scores, masked_softmax

# With fewer keys than a vector register holds, PyTorch's CPU kernel turns a query of NaN into zeros and so hides it.
FEW_KEYS = 16


def attend_weighted(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, *, scale: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """q [b, h, n, d], k, v [b, g, m, d], allowed broadcasting to [b, h, n, m] -> [b, h, n, d] and the weights."""
    if need_weights or k.shape[2] < FEW_KEYS:
        weights = masked_softmax(grouped_scores(q * scale, k), allowed)
        return grouped_mix(weights, v), weights if need_weights else None
    if allowed is None:
        return attend_grouped(q, k, v, scale=scale), None
    return attend_masked(q, k, v, allowed, scale=scale), None
