"""Rotary position embedding (Su et al., arXiv:2104.09864)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """base: wavelength base. fraction: part of each head that is rotated, from its first feature on. interleaved: pairs
    are (2i, 2i + 1) as in GPT-J and DeepSeek; otherwise (i, i + d/2) as in Llama and GPT-NeoX. angles: by how much each
    pair turns from one position to the next, in place of those of the base, where a checkpoint has scaled them (linear,
    llama3, yarn). amplitude: what cosines and sines are multiplied by (yarn)."""

    base: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    angles: Sequence[float] | None = None
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        numbers = all(isinstance(v, (int, float)) for v in (self.base, self.fraction))
        if not numbers or not 0 < self.base < math.inf or not 0 < self.fraction <= 1:
            raise ValueError(f"rotary: base={self.base!r} must be positive and fraction={self.fraction!r} in (0, 1]")
        if not isinstance(self.interleaved, bool):
            raise ValueError(f"rotary: interleaved={self.interleaved!r}; want True or False")
        for angle in (self.amplitude, *([] if self.angles is None else self.angles)):
            if isinstance(angle, bool) or not isinstance(angle, (int, float)) or not math.isfinite(angle):
                raise ValueError(f"rotary: amplitude and angles hold {angle!r}; want finite numbers")
        if self.angles is not None:
            object.__setattr__(self, "angles", tuple(self.angles))

    @classmethod
    def of(cls, value: Rotary | Mapping[str, Any] | None) -> Rotary | None:
        """From what a constructor or a JSON config holds."""
        if value is None or isinstance(value, cls):
            return value
        known = [part.name for part in fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(known):
            raise ValueError(f"rotary={value!r}; want a Rotary, or a mapping with some of {known}")
        return cls(**value)

    def features(self, head_dim: int) -> int:
        """How many features of a head are rotated: even, at least two."""
        rotated = int(head_dim * self.fraction + 1e-6) // 2 * 2  # 98 * (32 / 98) is a little less than 32
        if self.angles is not None and len(self.angles) * 2 != rotated:
            raise ValueError(
                f"rotary: {len(self.angles)} angles given; head_dim={head_dim}, fraction={self.fraction} has "
                f"{rotated // 2} pairs"
            )
        if rotated < 2:
            raise ValueError(
                f"rotary needs at least two features to turn; head_dim={head_dim}, fraction={self.fraction}"
            )
        return rotated

    def turns(self, head_dim: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """[rotated / 2]: by how much each pair turns from one position to the next."""
        if self.angles is not None:
            return torch.tensor(self.angles, device=device, dtype=dtype)
        rotated = self.features(head_dim)
        return self.base ** -(torch.arange(0, rotated, 2, device=device, dtype=dtype) / rotated)


def rotate(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Turns pair p of x [b, h, n, d] by positions * base^(-2p / rotated), or by positions * angles[p]. positions:
    [b or 1, n]. In float32."""
    rotated = rotary.features(x.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = positions[:, None, :, None].to(wide) * rotary.turns(x.shape[-1], wide, x.device)
    cos, sin = angle.cos(), angle.sin()
    if rotary.amplitude != 1.0:
        cos, sin = cos * rotary.amplitude, sin * rotary.amplitude
    turned, rest = x[..., :rotated].to(wide), x[..., rotated:]
    if rotary.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((out.to(x.dtype), rest), -1) if rest.shape[-1] else out.to(x.dtype)


def turn(keys: Tensor, by: Tensor, angles: Tensor) -> Tensor:
    """Keys [..., d] moved on by so many positions; the first 2 * len(angles) features turn, in halves."""
    half = angles.numel()
    angle = by[..., None] * angles
    cos, sin = angle.cos(), angle.sin()
    left, right, rest = keys.double().split([half, half, keys.shape[-1] - 2 * half], -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1).to(keys.dtype)
