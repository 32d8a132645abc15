"""The attention of ShiftAddViT, in which products of queries and keys become additions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.linear import hide, widen
from manyheads.mechanism import Call, Mechanism, Result

TAPS = 9


class ShiftAdd(Mechanism):
    """Linear attention with queries and keys of zeros and ones: what they multiply is only ever summed.

        x_i = v_i / 2 + (1 / pi) b(q_i) sum_j b(k_j)^T v_j,  out_i = x_i / |x_i| + sum_t c_t v_(i + t),  |t| <= 4

    per head and an o_proj; b(q) = 1 where q / |q| is above its mean, else 0, with the gradient of clamp(q / |q|, 0, 1);
    c: nine taps per head along the tokens. The mean is over the features, heads and real tokens of a row; in the
    released code over the whole batch too, so that a token's output depends on the other rows there. No causal form:
    the mean looks ahead. Additions are products here, as torch has no kernel for them: no time is saved. Not in the
    registry, whose suite wants gradients that are those of the function: a step's are not.
    Source: You et al., ShiftAddViT, arXiv:2306.06446; the released `LinAngularAttention_binary`, without its softmax
    residue of training. Linear layers of shifts are `manyheads convert --to shiftadd`.
    Weights: the code's qkv is q, k, v in this order, proj is o_proj, dconv.weight [h, 1, 9, 1] is taps [h, 1, 9].
    """

    card = Card(
        name="shiftadd",
        title="ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
        reference="arXiv:2306.06446",
        family=Family.LINEAR,
        patterns={"noncausal-self"},
        time="n",
        state="",
        decodes=False,
        notes="Additions in place of products of queries and keys; torch multiplies all the same.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.taps = nn.Parameter(torch.empty(heads, 1, TAPS).uniform_(-1 / 3, 1 / 3))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (hide(binary(t, call.padding), call.padding) for t in (q, k))
        v = hide(widen(v), call.padding)
        weights = None
        if call.dense is None and not call.need_weights:
            mixed = _unit(v / 2 + q @ (k.mT @ v) / math.pi) + self._neighbours(v, call.padding)
        else:
            weights = self._matrix(q, k, v, call)
            mixed = weights @ v
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2).to(x.dtype))
        return Result(output, None if weights is None or not call.need_weights else weights.to(x.dtype))

    def _neighbours(self, v: Tensor, padding: Tensor | None) -> Tensor:
        """The nine taps along real tokens; [b, h, n, d]."""
        order = None if padding is None else (~padding).int().argsort(dim=1, stable=True)
        rows = v if order is None else _taken(v, order)
        b, h, n, d = rows.shape
        flat = rows.permute(0, 3, 1, 2).reshape(b * d, h, n)
        found = F.conv1d(flat, self.taps.to(v.dtype), padding=TAPS // 2, groups=h)
        found = found.view(b, d, h, n).permute(0, 2, 3, 1)
        return found if order is None else hide(_taken(found, order.argsort(1)), padding)

    def _matrix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """What each value is multiplied by in all, [b, h, n, n]."""
        n = v.shape[2]
        real = torch.ones(1, n, dtype=torch.bool, device=v.device) if call.padding is None else call.padding
        both = (real[:, :, None] & real[:, None, :])[:, None]
        allowed = both if call.dense is None else both & call.dense
        place = real.cumsum(1)
        lag = (place[:, None] - place[:, :, None])[:, None]  # of key j behind query i
        tap = self.taps.to(v.dtype)[:, 0, (lag[:, 0] + TAPS // 2).clamp(0, TAPS - 1)].transpose(0, 1)
        near = tap.masked_fill(~(allowed & (lag.abs() <= TAPS // 2)), 0.0)
        far = (torch.eye(n, dtype=v.dtype, device=v.device) / 2 + q @ k.mT / math.pi).masked_fill(~allowed, 0.0)
        return far / _length(far @ v) + near


def binary(x: Tensor, padding: Tensor | None) -> Tensor:
    """x [b, h, n, d] -> zeros and ones, with the gradient of clamp(x / |x|, 0, 1)."""
    x = widen(x)
    x = x / _length(x)
    there = x.new_ones(x.shape[0], 1, x.shape[2], 1) if padding is None else padding[:, None, :, None].to(x.dtype)
    count = (there.sum((1, 2, 3), keepdim=True) * x.shape[1] * x.shape[3]).clamp(min=1)
    mean = torch.where(there > 0, x, 0.0).sum((1, 2, 3), keepdim=True) / count
    soft = x.clamp(0, 1)
    return (x > mean).to(x.dtype) + (soft - soft.detach())


def _length(x: Tensor) -> Tensor:
    """|x| over features, one where that is zero."""
    zero = (x == 0).all(-1, keepdim=True)
    return torch.where(zero, torch.ones_like(x), x).norm(dim=-1, keepdim=True).masked_fill(zero, 1.0)


def _unit(x: Tensor) -> Tensor:
    return x / _length(x)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[:, None, :, None].expand_as(x))
