"""Quantised storage: any policy's entries as 8- or 4-bit codes, the latest tokens as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.shrink.coded import Coded
from manyheads.shrink.group import Group

# By so much the range of an entry is widened, that what float16 makes of it still covers the entry.
HALF_ROUNDING, HALF_LEAST, HALF_MOST = 2.0**-10, 2.0**-24, 65504.0


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """Claim: keys and values bear 8 and 4 bits where keys' outlying channels are evened out first.

    code = round((x - zero) / scale), bits each, with one float16 scale and zero for every group_size channels of every
    entry; |x - decoded| <= scale / 2. Keys are first shifted by their channel's mid-range and divided by the square
    root of its half-range, [b, g, 1, d], fixed when the first entry is coded. The latest `residual` tokens are exact.
    Source: arXiv 2402.02750 (KIVI). There keys are coded in blocks of tokens with a scale per channel, which a policy
    that drops single entries would break up; here every entry bears its own scale, and the square root halves (in the
    logarithm) the spread between channels: on the packaged model's keys a smaller mean KL than evening out all of it.
    """

    bits: int = 4
    group_size: int = 64
    residual: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"Quantised: bits is 4 or 8; got {self.bits!r}")
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"Quantised: group_size must be a whole number of at least 1; got {self.group_size!r}")
        if not isinstance(self.residual, int) or self.residual < 0:
            raise ValueError(f"Quantised: residual must be a whole number of at least 0; got {self.residual!r}")

    def codec(self) -> Codec:
        """What codes one layer's entries."""
        return Codec(self)


class Codec(Coded):
    """A coded group's rows: keys and values [b, g, m, d] uint8 (4 bits: [b, g, m, d / 2], the first half of the
    channels in the low bits), keys_range and values_range [b, g, m, 2, groups of channels] float16, scale and zero.
    Keys' channels, "centre" and "size" [b, H, 1, d], are kept.
    """

    def __init__(self, how: Quantised) -> None:
        super().__init__(how.residual)
        self.how = how
        self.levels = 2**how.bits - 1

    def check(self, new: dict[str, Tensor]) -> None:
        for name, dim in self.dims.items():
            if self.how.bits == 4 and dim % 2:
                raise ValueError(f"Quantised(bits=4) packs channels in pairs; {name} have {dim}: use bits=8")

    def measure(self, groups: list[Group], real: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The middle and the size of every channel of the keys held; padding has no say."""
        recent = self._latest.rows["keys"]
        shape = (recent.shape[0], recent.shape[1], 1, recent.shape[3])
        centre = torch.zeros(shape, dtype=self.wide, device=recent.device)
        size = torch.ones_like(centre)
        for group in groups:
            held = real(group.slots()).expand(shape[0], len(group.heads), -1)
            if not group.length:
                continue
            whole = bool(held.all())
            keys = group.view("keys")
            for place, head in enumerate(group.heads):
                own, shown = keys[:, place], held[:, place, :, None]
                low = (own if whole else own.masked_fill(~shown, torch.inf)).amin(1).to(self.wide)
                high = (own if whole else own.masked_fill(~shown, -torch.inf)).amax(1).to(self.wide)
                some = shown.any(1)
                centre[:, head, 0] = torch.where(some, (low + high) / 2, 0)
                size[:, head, 0] = torch.where(some, (high - low) / 2, 1).sqrt()
        # A channel that has not moved yet must not blow up the first entry in which it does.
        mean = size.mean(-1, keepdim=True)
        return {"centre": centre, "size": torch.maximum(size, mean / 8).masked_fill(mean == 0, 1)}

    def blank(self, name: str, like: Tensor) -> dict[str, Tensor]:
        groups = self.dims[name] // self._width(name)
        codes = like.new_zeros((*like.shape[:3], self._packed(name)), dtype=torch.uint8)
        return {name: codes, f"{name}_range": like.new_zeros((*like.shape[:3], 2, groups), dtype=torch.float16)}

    def encode(self, name: str, rows: Tensor, heads: Tensor) -> dict[str, Tensor]:
        """rows [b, g, n, d] of the given heads -> codes and ranges."""
        rows = rows.detach().to(self.wide)
        if name == "keys":
            centre, size = self._channels(heads)
            rows = (rows - centre) / size
        rows = rows.unflatten(-1, (-1, self._width(name)))
        low, high = rows.amin(-1), rows.amax(-1)
        zero = (low - low.abs() * HALF_ROUNDING - HALF_LEAST).clamp(-HALF_MOST, HALF_MOST).half()
        step = (high - zero) / self.levels
        scale = (step * (1 + HALF_ROUNDING) + HALF_LEAST).clamp(HALF_LEAST, HALF_MOST).half()
        codes = (
            ((rows - zero[..., None]) / scale[..., None]).round_().clamp_(0, self.levels).to(torch.uint8).flatten(-2)
        )
        if self.how.bits == 4:
            left, right = codes.chunk(2, -1)
            codes = left | (right << 4)
        # Autocast knows no half precision on a CPU and would refuse to stack it.
        with torch.autocast(rows.device.type, enabled=False):
            return {name: codes, f"{name}_range": torch.stack([scale, zero], -2)}

    def decode(self, name: str, rows: dict[str, Tensor], heads: Tensor, out: Tensor | None = None) -> Tensor:
        """Codes and ranges of the given heads -> [b, g, n, d], float32 at least."""
        codes = rows[name]
        if out is None:
            out = codes.new_empty((*codes.shape[:3], self.dims[name]), dtype=self.wide)
        if self.how.bits == 4:
            left, right = out.chunk(2, -1)
            left.copy_(codes & 15)
            right.copy_(codes >> 4)
        else:
            out.copy_(codes)
        scale, zero = rows[f"{name}_range"].to(self.wide).unsqueeze(-1).unbind(-3)
        out.unflatten(-1, (-1, self._width(name))).mul_(scale).add_(zero)
        if name == "keys":
            centre, size = self._channels(heads)
            out.mul_(size).add_(centre)
        return out

    def entry_nbytes(self) -> int:
        """Bytes of one entry's codes, scales and zeros."""
        return sum(self._packed(name) + 4 * (dim // self._width(name)) for name, dim in self.dims.items())

    def fixed_nbytes(self) -> int:
        return self.exact_nbytes() + 2 * self.dims["keys"] * self.wide.itemsize

    def _width(self, name: str) -> int:
        """Channels that share a scale: as many as asked for, or the largest divisor of all below."""
        dim = self.dims[name]
        return next(width for width in range(min(dim, self.how.group_size), 0, -1) if dim % width == 0)

    def _packed(self, name: str) -> int:
        """Bytes of an entry's codes."""
        return self.dims[name] * self.how.bits // 8

    def _channels(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        return self.kept["centre"].index_select(1, heads), self.kept["size"].index_select(1, heads)
