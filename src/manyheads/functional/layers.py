"""Layers around which others may have put something: an adapter, quantised weights, a hook.

A mechanism that reads `layer.weight` computes without it. It calls the layer, or asks here.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from manyheads.functional.precision import own_dtype


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The weight of a Linear or Conv1d, where that and the bias are all that there is to a call of the layer.

    None where a call may do more: an adapter or a quantised layer in its place, a hook, a forward or a kind of weight
    of its own. The caller then has to call the layer.
    """
    if type(layer) is not nn.Linear and type(layer) is not nn.Conv1d:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return None
    return layer.weight if type(layer.weight) in (Tensor, nn.Parameter) else None


def call_in(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) in the dtype of x, whatever the dtype of the layer or of autocast: for what is computed in at least
    float32."""
    weight = plain_weight(layer)
    with own_dtype(x):
        if weight is not None and isinstance(layer, nn.Linear):
            return F.linear(x, weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
        held = chain(layer.named_parameters(), layer.named_buffers())
        other = {name: t.to(x.dtype) for name, t in held if t.is_floating_point() and t.dtype != x.dtype}
        return functional_call(layer, other, (x,)) if other else layer(x)


class RMSNorm(nn.RMSNorm):
    """PyTorch's, in the dtype of its weight and back in that of x: under autocast these differ, and PyTorch would warn,
    leave its fused way, and widen all that follows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class OffsetRMSNorm(nn.RMSNorm):
    """x / rms(x) * (offset + weight), in at least float32: checkpoints of Gemma hold gains less one, which in bfloat16
    cannot be added to the weight without losing digits."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        self.offset = offset
        super().__init__(size, eps=eps)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        gains = self.weight.to(wide) + self.offset
        return F.rms_norm(x.to(wide), self.normalized_shape, gains, self.eps).to(x.dtype)


def rms_norm(size: int, eps: float, offset: float = 0.0) -> nn.RMSNorm:
    """PyTorch's where gains are the weight itself."""
    return OffsetRMSNorm(size, eps, offset) if offset else nn.RMSNorm(size, eps=eps)
