"""Attention of rows of queries that see only a slice of the keys, a block of rows at a time.

b batch, h query heads, g key/value heads, n queries, m keys, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyheads.functional.grouped import attend_masked

# Rows worked on at once: a narrower block reads fewer keys that its mask forbids, a wider one makes fewer calls.
BLOCK = 64


def attend_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reach: Callable[[slice], slice],
    allowed: Callable[[slice, slice], Tensor],
    *,
    scale: float,
    block: int = BLOCK,
) -> Tensor:
    """q [b, h, n, d], k and v [b, g, m, d] -> [b, h, n, d]; rows with nothing to attend to are zero.

    reach: rows -> the slice of keys outside of which none of them may attend. allowed: (rows, keys) -> which of those,
    broadcasting to [b, h, rows, keys]. Memory grows with n times the width of a slice.
    """
    spans = [slice(start, min(start + block, q.shape[2])) for start in range(0, q.shape[2], block)]
    reached, parts = [reach(rows) for rows in spans], []
    queries, keys, values = q.split(block, 2), _Slices.apply(k, reached), _Slices.apply(v, reached)
    for rows, span, a, b, c in zip(spans, reached, queries, keys, values, strict=True):
        mask = allowed(rows, span).expand(-1, -1, rows.stop - rows.start, span.stop - span.start)
        parts.append(attend_masked(a, b, c, mask, scale=scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class _Slices(torch.autograd.Function):
    """Slices of [b, h, m, d] that may overlap. Its backward pass adds them up in one place, where that of each slice by
    itself would be as long as the whole."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slices: list[slice]) -> tuple[Tensor, ...]:
        return tuple(x[:, :, part] for part in slices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, list[slice]], output: tuple[Tensor, ...]) -> None:
        ctx.shape, ctx.slices = inputs[0].shape, inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for part, grad in zip(ctx.slices, grads, strict=True):
            total[:, :, part] += grad
        return total, None


def real_span(padding: Tensor | None, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """padding [b, m] -> where the first real token stands and where the last one ends, [b, 1, 1] each ([1, 1, 1])."""
    if padding is None:
        return torch.tensor([[[0]]], device=device), torch.tensor([[[m]]], device=device)
    real = padding.int()
    return real.argmax(1)[:, None, None], (m - real.flip(1).argmax(1))[:, None, None]
