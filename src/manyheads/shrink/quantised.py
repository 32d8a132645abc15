"""Quantised storage: any policy's entries as 8- or 4-bit codes, the latest tokens as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.hosts.attend import Scoring, masked_scores, with_bias
from manyheads.shrink.group import Group, Spare

if TYPE_CHECKING:
    from manyheads.hosts.attention import Visibility

# Numbers decoded at a time, for all heads together: 1 MiB of float32, which stays in a core's cache.
BLOCK = 2**18
# Queries that share a block's decoding.
QUERIES = 256
# Room for tokens to come behind the exact ones.
ROOM = 16
# By so much the range of an entry is widened, that what float16 makes of it still covers the entry.
HALF_ROUNDING, HALF_LEAST, HALF_MOST = 2.0**-10, 2.0**-24, 65504.0
NAMES = ("keys", "values")


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


class Codec:
    """One layer's exact tokens and channel ranges, and the way to its groups' codes and back.

    A coded group's rows: keys and values [b, g, m, d] uint8 (4 bits: [b, g, m, d / 2], the first half of the channels
    in the low bits), keys_range and values_range [b, g, m, 2, groups of channels] float16, scale and zero.
    """

    def __init__(self, how: Quantised) -> None:
        self.how = how
        self.levels = 2**how.bits - 1
        # The latest tokens of all heads, whether a head has dropped them or not; until they are more than the residual
        # nothing is read from codes.
        self._recent: Group | None = None
        self._dims: dict[str, int] = {}
        # Keys' channels, [b, H, 1, d].
        self._centre: Tensor | None = None
        self._size: Tensor | None = None

    # What the store calls.

    @property
    def nbytes(self) -> int:
        recent = 0 if self._recent is None else self._recent.nbytes
        return recent + sum(own.nbytes for own in (self._centre, self._size) if own is not None)

    def value_dim(self) -> int:
        return self._dims["values"]

    def adopt(self, new: dict[str, Tensor], slot: int) -> None:
        """The first pass: nothing is coded before its attention is done."""
        self._dims = {name: new[name].shape[-1] for name in NAMES}
        for name, dim in self._dims.items():
            if self.how.bits == 4 and dim % 2:
                raise ValueError(f"Quantised(bits=4) packs channels in pairs; {name} have {dim}: use bits=8")
        exact = {name: new[name].detach() for name in NAMES}
        self._recent = Group(list(range(new["keys"].shape[1])), exact, new["keys"].shape[2], first=slot)
        self._recent.owned = False

    def take(self, new: dict[str, Tensor], slot: int) -> dict[str, Tensor]:
        """New tokens of all heads: kept among the exact ones, and given back as rows of a group."""
        recent = self._latest
        if not recent.length:
            recent.first = slot
        recent.append({name: new[name].detach() for name in NAMES}, slot, lambda length, heads: ROOM)
        coded = {name: row for name, row in new.items() if name not in NAMES}
        if self._size is None:
            blank = {name: (*new[name].shape[:3], self._packed(name)) for name in NAMES}
            return coded | {name: recent.index.new_zeros(shape, dtype=torch.uint8) for name, shape in blank.items()}
        for name in NAMES:
            coded |= self.encode(name, new[name], recent.index)
        return coded

    def settle(self, groups: list[Group], spare: Spare, real: Callable[[Tensor], Tensor], pending: int) -> None:
        """After a pass: groups that still hold numbers are coded, and what is older than the residual is let go.
        pending: tokens beyond it that may still be taken back; real(slots): which are not padding."""
        recent = self._latest
        over = recent.length - self.how.residual - pending
        if over > 0 and self._size is None:
            self._measure(groups, real)
            for group in groups:
                if group.codec is not None:
                    self._convert(group, spare(group.length, group.heads))
        if over > 0:
            recent.drop_oldest(over)
        if not recent.owned:
            recent._move(recent.length + ROOM)
        for group in groups:
            if group.codec is None:
                # The exact ones follow where a policy has overwritten entries of the first pass.
                row, head, place, at = self._exact(group)
                for name in NAMES:
                    recent.view(name)[row, group.index[head], at] = group.view(name)[row, head, place]
                self._convert(group, spare(group.length, group.heads))

    def truncate(self, end: int) -> None:
        self._latest.truncate(end)

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._latest.on_batch(change)
        self._centre, self._size = (None if own is None else change(own) for own in (self._centre, self._size))

    def entry_nbytes(self) -> int:
        """Bytes of one entry's codes, scales and zeros."""
        return sum(self._packed(name) + 4 * (dim // self._width(name)) for name, dim in self._dims.items())

    def fixed_nbytes(self) -> int:
        """Bytes of one head of one row besides its entries."""
        exact = sum(self._latest.rows[name].element_size() * dim for name, dim in self._dims.items())
        return (self.how.residual + ROOM + 1) * exact + 2 * self._dims["keys"] * self._wide.itemsize

    # What groups call.

    def view(self, group: Group, name: str) -> Tensor:
        """All of a group's keys or values [b, g, m, d], decoded: for rules that score by them."""
        recent = self._latest.view(name)
        whole = recent.new_zeros((recent.shape[0], len(group.heads), group.length, recent.shape[-1]))
        if self._size is not None:
            for here, own in self._blocks(group, group.length, 0):
                whole[:, :, own] = self.decode(name, _part(group, name, here), group.index).to(whole.dtype)
        row, head, place, at = self._exact(group)
        whole[row, head, place] = recent[row, group.index[head], at]
        return whole

    def pick(self, group: Group, name: str, at: Tensor) -> Tensor:
        """The entries at the places `at` [b, g, s] alone, as `view` has them, [b, g, s, d]."""
        recent = self._latest.view(name)
        if self._size is None:
            rows = recent.new_zeros((*at.shape, recent.shape[-1]))
        else:
            rows = self.decode(name, self._rows_at(group, name, at), group.index).to(recent.dtype)
        row, head, place, there = self._exact(group, at)
        rows[row, head, place] = recent[row, group.index[head], there]
        return rows

    def put(self, group: Group, name: str, at: Tensor, new: Tensor) -> None:
        """Overwrites entries at the places `at` [b, g, s] by new [b, g, s, d]: their codes, and the exact ones too."""
        recent = self._latest.view(name)
        new = new.to(recent.dtype)
        if self._size is not None:
            # What a policy writes back as it was keeps its codes: coding the decoded again would add up errors.
            same, before = (self.pick(group, name, at) == new).all(-1), self._rows_at(group, name, at)
            for own, coded in self.encode(name, new, group.index).items():
                shape = (*at.shape, *(1,) * (coded.dim() - 3))
                held = group.rows[own][:, :, group.start : group.start + group.length]
                held.scatter_(2, at.view(shape).expand(coded.shape), before[own].where(same.view(shape), coded))
        row, head, place, there = self._exact(group, at)
        recent[row, group.index[head], there] = new[row, head, place]

    def attend(self, group: Group, queries: Tensor, scoring: Scoring, seen: Visibility) -> Tensor:
        """Attention [b, g, r, n, dv] of queries [b, g, r, n, d], a block of entries decoded at a time."""
        out = []
        for start in range(0, queries.shape[3], QUERIES):
            rows = slice(start, min(start + QUERIES, queries.shape[3]))
            out.append(self._attend(group, queries[:, :, :, rows], rows, scoring, seen))
        return out[0] if len(out) == 1 else torch.cat(out, 3)

    # Codes.

    def encode(self, name: str, rows: Tensor, heads: Tensor) -> dict[str, Tensor]:
        """rows [b, g, n, d] of the given heads -> codes and ranges."""
        rows = rows.detach().to(self._wide)
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
        return {name: codes, f"{name}_range": torch.stack([scale, zero], -2)}

    def decode(self, name: str, rows: dict[str, Tensor], heads: Tensor, out: Tensor | None = None) -> Tensor:
        """Codes and ranges of the given heads -> [b, g, n, d], float32 at least."""
        codes = rows[name]
        if out is None:
            out = codes.new_empty((*codes.shape[:3], self._dims[name]), dtype=self._wide)
        if self.how.bits == 4:
            left, right = out.chunk(2, -1)
            left.copy_(codes & 15)
            right.copy_(codes >> 4)
        else:
            out.copy_(codes)
        scale, zero = rows[f"{name}_range"].to(self._wide).unsqueeze(-1).unbind(-3)
        out.unflatten(-1, (-1, self._width(name))).mul_(scale).add_(zero)
        if name == "keys":
            centre, size = self._channels(heads)
            out.mul_(size).add_(centre)
        return out

    # Within.

    @property
    def _latest(self) -> Group:
        assert self._recent is not None
        return self._recent

    @property
    def _first(self) -> int:
        """Slot of the oldest exact token."""
        assert self._latest.first is not None
        return self._latest.first

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self._latest.rows["keys"].dtype, torch.float32)

    def _width(self, name: str) -> int:
        """Channels that share a scale: as many as asked for, or the largest divisor of all below."""
        dim = self._dims[name]
        return next(width for width in range(min(dim, self.how.group_size), 0, -1) if dim % width == 0)

    def _packed(self, name: str) -> int:
        """Bytes of an entry's codes."""
        return self._dims[name] * self.how.bits // 8

    def _channels(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        assert self._centre is not None
        assert self._size is not None
        return self._centre.index_select(1, heads), self._size.index_select(1, heads)

    def _measure(self, groups: list[Group], real: Callable[[Tensor], Tensor]) -> None:
        """The middle and the size of every channel of the keys held; padding has no say."""
        recent = self._latest.rows["keys"]
        shape = (recent.shape[0], recent.shape[1], 1, recent.shape[3])
        self._centre = torch.zeros(shape, dtype=self._wide, device=recent.device)
        size = torch.ones_like(self._centre)
        for group in groups:
            held = real(group.slots()).expand(shape[0], len(group.heads), -1)
            if not group.length:
                continue
            whole = bool(held.all())
            keys = group.view("keys")
            for place, head in enumerate(group.heads):
                own, shown = keys[:, place], held[:, place, :, None]
                low = (own if whole else own.masked_fill(~shown, torch.inf)).amin(1).to(self._wide)
                high = (own if whole else own.masked_fill(~shown, -torch.inf)).amax(1).to(self._wide)
                some = shown.any(1)
                self._centre[:, head, 0] = torch.where(some, (low + high) / 2, 0)
                size[:, head, 0] = torch.where(some, (high - low) / 2, 1).sqrt()
        # A channel that has not moved yet must not blow up the first entry in which it does.
        mean = size.mean(-1, keepdim=True)
        self._size = torch.maximum(size, mean / 8).masked_fill(mean == 0, 1)

    def _convert(self, group: Group, room: int) -> None:
        """From numbers to codes; before channels are measured the codes are only given their place."""
        length, rows = group.length, {}
        numbers = {name: group.view(name) for name in NAMES}
        for name, own in numbers.items():
            shape = (*own.shape[:2], length + room)
            groups = self._dims[name] // self._width(name)
            rows[name] = own.new_zeros((*shape, self._packed(name)), dtype=torch.uint8)
            rows[f"{name}_range"] = own.new_zeros((*shape, 2, groups), dtype=torch.float16)
            for _, here in self._blocks(group, length, 0) if self._size is not None else ():
                for part, coded in self.encode(name, own[:, :, here], group.index).items():
                    rows[part][:, :, here] = coded
        for name in (other for other in group.rows if not other.startswith(NAMES)):
            held = group.view(name)
            rows[name] = held.new_empty((*held.shape[:2], length + room, *held.shape[3:]))
            rows[name][:, :, :length] = held
        group.rows, group.start, group.owned, group.codec = rows, 0, True, self

    def _blocks(self, group: Group, length: int, row_scores: int) -> Iterator[tuple[slice, slice]]:
        """The first entries of a group, few enough to be decoded at once: as places in its buffer, and from 0 on."""
        widest = max(*self._dims.values(), row_scores)
        step = max(64, BLOCK // (self._latest.rows["keys"].shape[0] * len(group.heads) * widest))
        for at in range(0, length, step):
            end = min(at + step, length)
            yield slice(group.start + at, group.start + end), slice(at, end)

    def _block(self, name: str, group: Group, here: slice, again: dict[str, Tensor] | None) -> Tensor:
        """One block decoded, into the memory of the one before where no gradient needs that: fresh pages cost more
        than what is written to them."""
        out = None
        if again is not None:
            if name not in again:
                shape = (*group.rows[name].shape[:2], here.stop - here.start, self._dims[name])
                again[name] = torch.empty(shape, dtype=self._wide, device=group.index.device)
            out = again[name][:, :, : here.stop - here.start]
        return self.decode(name, _part(group, name, here), group.index, out)

    def _rows_at(self, group: Group, name: str, at: Tensor) -> dict[str, Tensor]:
        part = _part(group, name, slice(group.start, group.start + group.length))
        wide = {
            k: at.view(*at.shape, *(1,) * (row.dim() - 3)).expand(*at.shape, *row.shape[3:]) for k, row in part.items()
        }
        return {k: row.gather(2, wide[k]) for k, row in part.items()}

    def _exact(self, group: Group, at: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, head and place (among those in `at`) of the group's entries that are also there as they were; where."""
        slots = group.slots().expand(self._latest.rows["keys"].shape[0], len(group.heads), -1)
        slots = slots if at is None else slots.gather(2, at)
        row, head, place = (slots >= self._first).nonzero(as_tuple=True)
        return row, head, place, slots[row, head, place].long() - self._first

    def _attend(self, group: Group, queries: Tensor, rows: slice, scoring: Scoring, seen: Visibility) -> Tensor:
        r, n = queries.shape[2:4]
        recent, slots, bias = self._latest, group.slots(), group.bias()
        sums = Sums(queries, self.value_dim(), scoring, self._wide)
        coded = group.length
        if group.first is not None:
            coded = max(0, min(coded, self._first - group.first))
        elif self._size is None:
            coded = 0
        far = slots.masked_fill(slots >= self._first, -1)
        again: dict[str, Tensor] | None = None if torch.is_grad_enabled() and queries.requires_grad else {}
        for here, own in self._blocks(group, coded, r * n):
            mask = with_bias(seen.allowed(rows, far[:, :, own]), None if bias is None else bias[:, :, own])
            keys, values = (self._block(name, group, here, again) for name in NAMES)
            sums.add(keys, values, mask)
        if recent.length:
            near, added = self._near(slots, bias)
            keys, values = (recent.view(name).index_select(1, group.index).to(self._wide) for name in NAMES)
            sums.add(keys, values, with_bias(seen.allowed(rows, near), added))
        return sums.result().to(queries.dtype)

    def _near(self, slots: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The exact tokens' slots [b or 1, g or 1, tokens], -1 where a head has dropped them; and their bias."""
        places = self._latest.length + 1
        # Everything older falls on one place more, before the first.
        at = (slots.long() - self._first + 1).clamp_min(0)
        near = slots.new_full((*slots.shape[:2], places), -1).scatter_(2, at, slots)[:, :, 1:]
        if bias is None:
            return near, None
        return near, bias.new_zeros((*bias.shape[:2], places)).scatter_(2, at, bias)[:, :, 1:]


def _part(group: Group, name: str, here: slice) -> dict[str, Tensor]:
    return {k: group.rows[k][:, :, here] for k in (name, f"{name}_range")}


class Sums:
    """Softmax over entries that come in parts: the largest score so far, and the sums relative to it."""

    def __init__(self, queries: Tensor, value_dim: int, scoring: Scoring, dtype: torch.dtype) -> None:
        self.queries, self.scoring = queries.to(dtype), scoring
        self.top = self.queries.new_full((*queries.shape[:-1], 1), torch.finfo(dtype).min)
        self.total = torch.zeros_like(self.top)
        self.out = self.queries.new_zeros((*queries.shape[:-1], value_dim))

    def add(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """keys, values [b, g, m, d]; mask [b or 1, g or 1, n, m]."""
        scores = masked_scores(self.queries, keys, self.scoring, mask)
        top = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        weights, left = (scores - top).exp(), (self.top - top).exp()
        b, g, r, n, m = weights.shape
        read = (weights.reshape(b, g, r * n, m) @ values).view(b, g, r, n, -1)
        self.top, self.total, self.out = top, self.total * left + weights.sum(-1, keepdim=True), self.out * left + read

    def result(self) -> Tensor:
        total, out = self.total, self.out
        if self.scoring.sinks is not None:
            sinks = self.scoring.sinks.to(total.dtype).view(1, *self.queries.shape[1:3], 1, 1)
            top = torch.maximum(self.top, sinks)
            left = (self.top - top).exp()
            total, out = total * left + (sinks - top).exp(), out * left
        return out / total.clamp_min(torch.finfo(total.dtype).tiny)
