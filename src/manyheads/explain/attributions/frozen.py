"""A norm with its statistics held: the linear map that it is in one pass, found from outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Frozen:
    """x -> gain * (x - mean(x), if centred) + bias, gain [b, e], bias [e]."""

    gain: Tensor
    bias: Tensor
    centred: bool

    def back(self, direction: Tensor) -> Tensor:
        """The direction [b, e] of the output, as one of the input."""
        found = self.gain * direction
        return found - found.mean(-1, keepdim=True) if self.centred else found


def is_norm(module: nn.Module) -> bool:
    """A module without children whose parameters, if any, are vectors, and whose name says norm."""
    alone = next(module.children(), None) is None
    name = type(module).__name__.lower()
    return alone and ("norm" in name or name.startswith("ln")) and all(p.dim() == 1 for p in module.parameters())


def freeze(module: nn.Module, given: Tensor, gave: Tensor) -> Frozen:
    """The map of this pass, given [b, e] -> gave [b, e]. Its bias, weights and centring are asked of the module itself
    by three vectors, so that every RMS and layer norm will do, 1 + w or w; the scale is read off the pass."""
    e = given.shape[-1]
    probe = torch.ones(1, 1, e, dtype=given.dtype, device=given.device)
    probe[..., 1::2] = -1
    if e % 2:
        probe[..., -1] = -1
        probe[..., 0] = 2
    bias = module(torch.zeros_like(probe))[0, 0]
    there, moved = module(probe)[0, 0] - bias, module(probe + 3)[0, 0] - bias
    centred = bool((there - moved).abs().max() <= 1e-3 * there.abs().max())
    weight = there / probe[0, 0]
    linear = weight * (given - given.mean(-1, keepdim=True) if centred else given)
    scale = ((gave - bias) * linear).sum(-1) / linear.square().sum(-1).clamp_min(torch.finfo(linear.dtype).tiny)
    frozen = Frozen(scale[:, None] * weight, bias, centred)
    if float((scale[:, None] * linear + bias - gave).abs().max()) > 1e-2 * float(gave.abs().max()):
        raise ValueError(f"{type(module).__name__} is neither a layer norm nor an RMS norm")
    return frozen
