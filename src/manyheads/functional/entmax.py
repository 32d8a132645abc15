"""The alpha-entmax family: softmax at alpha = 1, sparsemax at alpha = 2, sparse weights for every alpha above 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Half of the steps below bisect and half are Newton's, which converge quadratically. Hard cases (one score after the
# other at the edge of the support) need 12 for the precision of float64.
STEPS = 14


def entmax(scores: Tensor, beta: Tensor, allowed: Tensor | None = None) -> Tensor:
    """p_j = [1 + beta (z_j + s)]_+^(1 / beta) over the last axis, with s such that p sums to one.

    scores: [..., m]. beta = alpha - 1, in (0, 1], broadcast to the scores with a last axis of one; it is what is given
    because 1 + beta loses a small beta to rounding. allowed: boolean; what is not allowed is zero, and so is a row with
    nothing allowed. Computed in float32 at least. Peters et al., arXiv:1905.05702, write tau = -1 - beta s.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    z, tiny = scores.to(wide), torch.finfo(wide).tiny
    nothing = None
    if allowed is not None:
        nothing = ~allowed.any(-1, keepdim=True)
        z = z.masked_fill(~allowed, -torch.inf).masked_fill(nothing, 0.0)
    weights: Tensor = _Entmax.apply(z, beta.to(wide).clamp(min=tiny**0.5))
    return (weights if nothing is None else weights.masked_fill(nothing, 0.0)).to(scores.dtype)


def _power(u: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """p = [1 + beta u]_+^(1 / beta), which is exp(u) as beta goes to zero, and its slope in u, p^(1 - beta)."""
    t = (beta * u).clamp_min_(-1.0)
    p = t.log1p().div_(beta).exp_()
    return p, p / t.add_(1.0).clamp_min_(torch.finfo(u.dtype).tiny)


def _shift(z: Tensor, beta: Tensor) -> Tensor:
    """The s at which p sums to one, for scores whose largest is zero.

    (sum p)^beta is a norm of what is affine in s, hence convex: a Newton step from anywhere is an upper bound of the
    root, and it is exact where the support is known and its entries are equal.
    """
    hi = torch.zeros_like(z[..., :1])
    lo = (-beta * math.log(z.shape[-1])).expm1() / beta + hi
    for step in range(STEPS):
        s = hi if step % 2 else (lo + hi) / 2
        p, slope = _power(z + s, beta)
        total = p.sum(-1, keepdim=True)
        excess = -total * (-beta * total.log()).expm1() / beta
        lo = torch.where(total < 1, s, lo)
        hi = torch.minimum(hi, s - excess / slope.sum(-1, keepdim=True))
    return hi


def _curve(p: Tensor, slope: Tensor, beta: Tensor) -> Tensor:
    """d p / d beta at fixed u: (p - slope - beta p log p) / beta^2, by its series where that cancels."""
    log = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    w = beta * log
    series = torch.zeros_like(w)
    for k in range(9 if p.dtype == torch.float64 else 4, -1, -1):
        # (1 - w - e^-w) / w^2 = -1/2! + w/3! - w^2/4! + ...
        series = series * (-w / (k + 3)) - 1.0
    near = p * log.square() * series / 2
    far = (p - slope - p * w) / beta.square()
    return torch.where(w.abs() < 0.1, near, far)


class _Entmax(torch.autograd.Function):
    """The derivatives are those of the exact solution: they follow from sum p = 1, not from the iteration."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, beta: Tensor) -> Tensor:
        z = z - z.amax(-1, keepdim=True)
        p, _ = _power(z + _shift(z, beta), beta)
        return p / p.sum(-1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, beta = ctx.saved_tensors
        support = p > 0
        slope = torch.where(support, p.clamp(min=torch.finfo(p.dtype).tiny).pow(1.0 - beta), 0.0)
        mean = (grad * slope).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
        z_grad = slope * (grad - mean)
        if not ctx.needs_input_grad[1]:
            return z_grad, None
        # Moving beta moves p at fixed s, and then s moves so that p sums to one again.
        beta_grad = torch.where(support, (grad - mean) * _curve(p, slope, beta), 0.0)
        return z_grad, beta_grad.sum_to_size(beta.shape)
