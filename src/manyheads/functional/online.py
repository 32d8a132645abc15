"""A small network per head whose weights learn keys and values by gradient descent while a sequence is read.

With layers z_l = W_l h_(l-1), h_l = silu(z_l), output z_L, and for each token the loss |M(k) - v|^2 / d:

    S_t = eta_t S_(t-1) - theta_t grad loss(anchor; k_t, v_t),  M_t = (1 - alpha_t) M_(t-1) + S_t,  read: M_t(q_t)

Gradients are taken at the anchor, the weights before the chunk, so that each is an outer product of two vectors known
at once: M_t is never built, and reading it is attention among the tokens of the chunk, layer by layer.
b batch, h heads, t tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(NamedTuple):
    """now, speed, anchor: a tensor [b, h, out, in] per layer; M, S and the weights at which gradients are taken."""

    now: list[Tensor]
    speed: list[Tensor]
    anchor: list[Tensor]

    def refreshed(self, rows: Tensor | None) -> Weights:
        """A chunk begins: the anchor is M, in all rows or where rows [b] says."""
        if rows is None:
            return self._replace(anchor=self.now)
        begins = rows[:, None, None, None]
        return self._replace(anchor=[torch.where(begins, a, b) for a, b in zip(self.now, self.anchor, strict=True)])


class Rates(NamedTuple):
    """Per token [b, h, t]: log(1 - alpha), log(eta), theta. there [b, 1, t] or None: tokens that do not count change
    nothing."""

    log_keep: Tensor
    log_momentum: Tensor
    step: Tensor
    there: Tensor | None = None


def apply(weights: list[Tensor], x: Tensor) -> Tensor:
    """M(x) with the same weights for every token: x [b, h, t, in] -> [b, h, t, out]."""
    for layer, matrix in enumerate(weights):
        x = (F.silu(x) if layer else x) @ matrix.mT
    return x


def learn(memory: Weights, q: Tensor, k: Tensor, v: Tensor, rates: Rates) -> tuple[Tensor, Weights]:
    """One chunk, or a part of one: M_t(q_t) [b, h, t, d] and the weights after it. q, k, v [b, h, t, d]."""
    inputs, errors = gradients(memory.anchor, k, v)
    keep, momentum, both = _products(rates)
    step = rates.step if rates.there is None else rates.step * rates.there
    errors = [-step[..., None] * error for error in errors]
    first = both[..., 0]  # the share of S before the chunk in each M_t
    h, now, speed = q, [], []
    for layer, (matrix, moving) in enumerate(zip(memory.now, memory.speed, strict=True)):
        h = F.silu(h) if layer else h
        near = (h @ inputs[layer].mT * both[..., 1:]) @ errors[layer]
        now.append(
            _at_end(matrix, keep[..., -1], moving, first[..., -1], errors[layer], both[..., -1, 1:], inputs[layer])
        )
        last = momentum[..., -1, :]
        speed.append(_at_end(moving, last[..., 0], None, None, errors[layer], last[..., 1:], inputs[layer]))
        h = keep[..., None] * (h @ matrix.mT) + first[..., None] * (h @ moving.mT) + near
    return h, Weights(now, speed, memory.anchor)


def gradients(weights: list[Tensor], k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What each layer gets as input, and d loss / d z_l: the gradient of W_l is their outer product, per token."""
    inputs, z = [], [k]
    for layer, matrix in enumerate(weights):
        inputs.append(F.silu(z[-1]) if layer else k)
        z.append(inputs[-1] @ matrix.mT)
    errors = [2.0 / v.shape[-1] * (z[-1] - v)]
    for layer in range(len(weights) - 1, 0, -1):
        gate = z[layer].sigmoid()
        slope = gate * (1 + z[layer] * (1 - gate))
        errors.insert(0, (errors[0] @ weights[layer]) * slope)
    return inputs, errors


def _products(rates: Rates) -> tuple[Tensor, Tensor, Tensor]:
    """keep [b, h, t]: the share of M_0 in M_t. momentum, both [b, h, t, 1 + t]: the share of S_0 and of each token's
    step in S_t, and in M_t."""
    log_keep, log_momentum = rates.log_keep, rates.log_momentum
    if rates.there is not None:
        log_keep, log_momentum = log_keep * rates.there, log_momentum * rates.there
    kept, moved = log_keep.cumsum(-1), log_momentum.cumsum(-1)
    momentum = _below(moved, F.pad(moved, (1, 0)), 1)
    stay = _below(kept, kept, 0)
    if rates.there is not None:
        stay = stay * rates.there[..., None, :]  # M does not move where there is no token, though S is not zero
    return kept.exp(), momentum, stay @ momentum


def _below(ends: Tensor, starts: Tensor, diagonal: int) -> Tensor:
    """exp(ends_t - starts_i) for i <= t + diagonal, else zero."""
    gaps = ends[..., :, None] - starts[..., None, :]
    future = torch.ones(gaps.shape[-2:], dtype=torch.bool, device=gaps.device).triu(1 + diagonal)
    return gaps.masked_fill(future, -torch.inf).exp()


def _at_end(
    matrix: Tensor,
    keep: Tensor,
    other: Tensor | None,
    share: Tensor | None,
    left: Tensor,
    factors: Tensor,
    right: Tensor,
) -> Tensor:
    """keep matrix + share other + sum over tokens of factors left (x) right."""
    new = keep[..., None, None] * matrix + (left * factors[..., None]).mT @ right
    return new if other is None or share is None else new + share[..., None, None] * other
