"""Softmax attention of one constant query over every prefix, as a scan over (maximum, numerator, denominator)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Tokens whose weights are built at once; the cost per token is chunk * d multiplications.
CHUNK = 64


class Prefix(NamedTuple):
    """The softmax so far: maximum [b, h, 1] of the scores, and with exp(score - maximum) as weights the numerator
    [b, h, d], a sum of values, and the denominator [b, h, 1], the sum of weights."""

    maximum: Tensor
    numerator: Tensor
    denominator: Tensor

    @classmethod
    def empty(cls, v: Tensor) -> Prefix:
        zero = torch.zeros_like(v[:, :, 0])
        # The lowest number, not -inf: differences of maxima must not be NaN before the first key.
        return cls(torch.full_like(zero[..., :1], torch.finfo(v.dtype).min), zero, zero[..., :1].clone())


def prefix_softmax(
    scores: Tensor, v: Tensor, before: Prefix | None = None, *, chunk: int = CHUNK
) -> tuple[Tensor, Prefix]:
    """out_i = sum over j <= i of softmax(scores_0 .. scores_i)_j v_j, and the prefix after the last token.

    scores [b, h, n]: -inf for tokens that are not there. v [b, h, n, d]. before: the tokens that came earlier. Exact
    for any scores: every weight is exp(score - largest score so far). Prefixes without a token give zeros.
    """
    prefix = Prefix.empty(v) if before is None else before
    outs = []
    for part, values in zip(scores.split(chunk, 2), v.split(chunk, 2), strict=True):
        out, prefix = _extend(prefix, part, values)
        outs.append(out)
    # Laid out as [b, n, h, d]: joining the heads later moves nothing.
    return torch.cat([out.transpose(1, 2) for out in outs], 1).transpose(1, 2), prefix


def _extend(before: Prefix, scores: Tensor, v: Tensor) -> tuple[Tensor, Prefix]:
    # The maximum cancels between numerator and denominator, so that no gradient needs to pass through it.
    maximum = torch.maximum(scores.detach().cummax(-1).values, before.maximum)
    future = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool, device=scores.device).triu(1)
    gaps = scores[..., None, :] - maximum[..., :, None]
    weights = gaps.masked_fill(future, -torch.inf).exp()
    kept = (before.maximum - maximum).exp()[..., None]
    numerator = kept * before.numerator[:, :, None] + weights @ v
    denominator = kept * before.denominator[:, :, None] + weights.sum(-1, keepdim=True)
    out = numerator / torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    # Copies: a view would hold the whole chunk in memory.
    return out, Prefix(maximum[..., -1:].clone(), numerator[:, :, -1].clone(), denominator[:, :, -1].clone())
