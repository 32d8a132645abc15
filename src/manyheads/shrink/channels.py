"""Narrower keys: any policy's entries without the channels of their keys that matter least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.shrink.coded import Coded, Sums, part_of
from manyheads.shrink.group import Group

if TYPE_CHECKING:
    from manyheads.hosts.attend import Scoring
    from manyheads.hosts.visibility import Visibility


@dataclass(frozen=True, kw_only=True)
class ThinK:
    """Claim: a head's keys have channels that its queries hardly look at; leave those out.

    importance(c) = mean over the window's queries and a KV head's query heads of q_c^2, times the mean over the keys
    held of k_c^2, [b, H, d]; the int(d key_channel_compression_ratio) least are not stored. Fixed when more than
    window_size tokens are held; the latest window_size tokens keep all their channels. Values stay as they are, so that
    a ratio of 0.5 saves a quarter of an entry. In a prompt that comes in chunks the first one decides.
    Source: arXiv 2407.21018, NVIDIA/kvpress `think_press.py`, whose rule this is; it prunes the window too, sets
    channels to zero, which saves no memory, and keeps decoded tokens whole, as the paper does. Here a decoded token is
    pruned once window_size others have followed it.
    """

    key_channel_compression_ratio: float = 0.5
    window_size: int = 32

    def __post_init__(self) -> None:
        ratio, size = self.key_channel_compression_ratio, self.window_size
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise ValueError(
                f"ThinK: key_channel_compression_ratio is the share of channels left out, from 0 to below 1; "
                f"got {ratio!r}"
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"ThinK: window_size must be a whole number of at least 1; got {size!r}")

    @property
    def residual(self) -> int:
        return self.window_size

    def codec(self) -> Narrow:
        """What holds one layer's entries."""
        return Narrow(self)


class Narrow(Coded):
    """Rows of a coded group: keys [b, g, m, k], the k kept channels of each head in order; values [b, g, m, d].
    "channels" [b, H, k] are kept; until they are known, "asked" [b, H, window, d]: the latest queries' squares, zero
    where there was padding, and "real" [b, 1, window].
    """

    def __init__(self, how: ThinK) -> None:
        super().__init__(how.window_size)
        self.how = how
        self.asked: Tensor | None = None
        self.real: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(own.nbytes for own in (self.asked, self.real) if own is not None)

    @property
    def _width(self) -> int:
        """Channels that are kept."""
        return self.dims["keys"] - int(self.dims["keys"] * self.how.key_channel_compression_ratio)

    def observe(self, queries: Tensor, seen: Visibility) -> None:
        if self.kept:
            return
        n, latest = queries.shape[3], min(queries.shape[3], self.how.window_size)
        slots = torch.arange(n - latest, n, device=queries.device)[None, None] + seen.offset
        real = seen.real(slots).expand(queries.shape[0], 1, latest)
        squares = queries[:, :, :, n - latest :].detach().to(self.wide).square().mean(2) * real[..., None]
        if self.asked is not None and self.real is not None:
            squares, real = torch.cat([self.asked, squares], 2), torch.cat([self.real, real], 2)
        self.asked = squares[:, :, -self.how.window_size :].clone()
        self.real = real[..., -self.how.window_size :].clone()

    def measure(self, groups: list[Group], real: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        assert self.asked is not None
        assert self.real is not None
        looked = self.asked.sum(2) / self.real.sum(2).clamp_min(1)[..., None]
        held = torch.zeros_like(looked)
        for group in groups:
            shown = real(group.slots()).expand(looked.shape[0], len(group.heads), -1)
            squares = group.view("keys").to(self.wide).square() * shown[..., None]
            held[:, group.index] = squares.sum(2) / shown.sum(2).clamp_min(1)[..., None]
        self.asked = self.real = None
        return {"channels": (looked * held).topk(self._width, dim=-1).indices.sort(-1).values}

    def blank(self, name: str, like: Tensor) -> dict[str, Tensor]:
        width = self._width if name == "keys" else self.dims[name]
        return {name: like.new_zeros((*like.shape[:3], width), dtype=self._latest.rows[name].dtype)}

    def encode(self, name: str, rows: Tensor, heads: Tensor) -> dict[str, Tensor]:
        return {name: self._picked(rows.detach(), heads) if name == "keys" else rows.detach()}

    def decode(self, name: str, rows: dict[str, Tensor], heads: Tensor, out: Tensor | None = None) -> Tensor:
        own = rows[name]
        if name != "keys":
            return own
        whole = own.new_zeros((*own.shape[:3], self.dims["keys"]))
        return whole.scatter_(3, self._at(heads).expand_as(own), own)

    def sums(self, group: Group, queries: Tensor, scoring: Scoring) -> Sums:
        found = super().sums(group, queries, scoring)
        if self.kept:
            found.narrow = self._picked(found.queries.flatten(2, 3), group.index).unflatten(2, queries.shape[2:4])
        return found

    def add(self, sums: Sums, group: Group, here: slice, mask: Tensor | None, again: dict[str, Tensor] | None) -> None:
        """The kept channels of queries meet keys as they are held: nothing is made whole for it."""
        keys, values = (part_of(group, name, here)[name].to(self.wide) for name in ("keys", "values"))
        sums.add(keys, values, mask, sums.narrow)

    def entry_nbytes(self) -> int:
        rows = self._latest.rows
        return self._width * rows["keys"].element_size() + self.dims["values"] * rows["values"].element_size()

    def fixed_nbytes(self) -> int:
        return self.exact_nbytes() + self._width * 8

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        super().on_batch(change)
        self.asked, self.real = (None if own is None else change(own) for own in (self.asked, self.real))

    def _at(self, heads: Tensor) -> Tensor:
        """[b, g, 1, k]."""
        return self.kept["channels"].index_select(1, heads).unsqueeze(2)

    def _picked(self, rows: Tensor, heads: Tensor) -> Tensor:
        """The kept channels [b, g, n, k] of rows [b, g, n, d]."""
        return rows.gather(3, self._at(heads).expand(-1, -1, rows.shape[2], -1))
