"""Storage in a form of its own: the latest tokens as they are, older ones as a codec makes and reads them.

Legend: b batch, H KV heads, g heads of a group, r query heads on each, n queries, m entries held, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.hosts.attend import Scoring, masked_scores, with_bias
from manyheads.shrink.group import Group, Spare

if TYPE_CHECKING:
    from manyheads.hosts.visibility import Visibility

# Numbers decoded at a time, for all heads together: 1 MiB of float32, which stays in a core's cache.
BLOCK = 2**18
# Queries that share a block's decoding.
QUERIES = 256
# Room for tokens to come behind the exact ones.
ROOM = 16
NAMES = ("keys", "values")


class Coded:
    """Base of codecs: one layer's exact tokens, and the way to its groups' codes and back.

    A coded group's rows are what `encode` makes: "keys" and "values" [b, g, m, ...], and "keys_range", "values_range"
    where a codec needs them.
    """

    def __init__(self, residual: int) -> None:
        self.residual = residual
        # The latest tokens of all heads, whether a head has dropped them or not; until they are more than the residual
        # nothing is read from codes.
        self._recent: Group | None = None
        self.dims: dict[str, int] = {}
        # What `measure` found, rows of the batch first; nothing before.
        self.kept: dict[str, Tensor] = {}

    # What a codec says.

    def check(self, new: dict[str, Tensor]) -> None:
        """A ValueError where rows [b, H, n, d] cannot be coded."""

    def observe(self, queries: Tensor, seen: Visibility) -> None:
        """Queries [b, H, r, n, d] of every pass, before entries leave."""

    def measure(self, groups: list[Group], real: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What coding needs to know of the entries held, when the first of them is coded."""
        raise NotImplementedError

    def blank(self, name: str, like: Tensor) -> dict[str, Tensor]:
        """Empty codes for as many entries as rows like [b, g, n, any] are."""
        raise NotImplementedError

    def encode(self, name: str, rows: Tensor, heads: Tensor) -> dict[str, Tensor]:
        """rows [b, g, n, d] of the given heads -> codes."""
        raise NotImplementedError

    def decode(self, name: str, rows: dict[str, Tensor], heads: Tensor, out: Tensor | None = None) -> Tensor:
        """Codes of the given heads -> [b, g, n, d], float32 at least."""
        raise NotImplementedError

    def sums(self, group: Group, queries: Tensor, scoring: Scoring) -> Sums:
        """Where the parts of one pass' attention are added up."""
        return Sums(queries, self.value_dim(), scoring, self.wide)

    def add(self, sums: Sums, group: Group, here: slice, mask: Tensor | None, again: dict[str, Tensor] | None) -> None:
        """Attention to the coded entries `here`."""
        keys, values = (self.block(name, group, here, again) for name in NAMES)
        sums.add(keys, values, mask)

    def entry_nbytes(self) -> int:
        """Bytes of one entry's codes."""
        raise NotImplementedError

    def fixed_nbytes(self) -> int:
        """Bytes of one head of one row besides its entries."""
        raise NotImplementedError

    # What the store calls.

    @property
    def nbytes(self) -> int:
        return (0 if self._recent is None else self._recent.nbytes) + sum(own.nbytes for own in self.kept.values())

    def value_dim(self) -> int:
        return self.dims["values"]

    def adopt(self, new: dict[str, Tensor], slot: int) -> None:
        """The first pass: nothing is coded before its attention is done."""
        self.dims = {name: new[name].shape[-1] for name in NAMES}
        self.check(new)
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
        if not self.kept:
            return coded | {name: self.blank(name, new[name])[name] for name in NAMES}
        for name in NAMES:
            coded |= self.encode(name, new[name], recent.index)
        return coded

    def settle(self, groups: list[Group], spare: Spare, real: Callable[[Tensor], Tensor], pending: int) -> None:
        """After a pass: groups that still hold numbers are coded, and what is older than the residual is let go.
        pending: tokens beyond it that may still be taken back; real(slots): which are not padding."""
        recent = self._latest
        over = recent.length - self.residual - pending
        if over > 0 and not self.kept:
            self.kept = self.measure(groups, real)
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
        self.kept = {name: change(own) for name, own in self.kept.items()}

    def exact_nbytes(self) -> int:
        """Bytes of the exact tokens of one head of one row."""
        size = sum(self._latest.rows[name].element_size() * dim for name, dim in self.dims.items())
        return (self.residual + ROOM + 1) * size

    # What groups call.

    def view(self, group: Group, name: str) -> Tensor:
        """All of a group's keys or values [b, g, m, d], decoded: for rules that score by them."""
        recent = self._latest.view(name)
        whole = recent.new_zeros((recent.shape[0], len(group.heads), group.length, recent.shape[-1]))
        if self.kept:
            for here, own in self._blocks(group, group.length, 0):
                whole[:, :, own] = self.decode(name, part_of(group, name, here), group.index).to(whole.dtype)
        row, head, place, at = self._exact(group)
        whole[row, head, place] = recent[row, group.index[head], at]
        return whole

    def pick(self, group: Group, name: str, at: Tensor) -> Tensor:
        """The entries at the places `at` [b, g, s] alone, as `view` has them, [b, g, s, d]."""
        recent = self._latest.view(name)
        if not self.kept:
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
        if self.kept:
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
    def wide(self) -> torch.dtype:
        return torch.promote_types(self._latest.rows["keys"].dtype, torch.float32)

    def _convert(self, group: Group, room: int) -> None:
        """From numbers to codes; before these are measured they are only given their place."""
        length = group.length
        rows: dict[str, Tensor] = {}
        numbers = {name: group.view(name) for name in NAMES}
        for name, own in numbers.items():
            rows |= self.blank(name, own.new_empty(()).expand(*own.shape[:2], length + room, 1))
            for _, here in self._blocks(group, length, 0) if self.kept else ():
                for part, coded in self.encode(name, own[:, :, here], group.index).items():
                    rows[part][:, :, here] = coded
        for name in (other for other in group.rows if not other.startswith(NAMES)):
            held = group.view(name)
            rows[name] = held.new_empty((*held.shape[:2], length + room, *held.shape[3:]))
            rows[name][:, :, :length] = held
        group.rows, group.start, group.owned, group.codec = rows, 0, True, self

    def _blocks(self, group: Group, length: int, row_scores: int) -> Iterator[tuple[slice, slice]]:
        """The first entries of a group, few enough to be decoded at once: as places in its buffer, and from 0 on."""
        widest = max(*self.dims.values(), row_scores)
        step = max(64, BLOCK // (self._latest.rows["keys"].shape[0] * len(group.heads) * widest))
        for at in range(0, length, step):
            end = min(at + step, length)
            yield slice(group.start + at, group.start + end), slice(at, end)

    def block(self, name: str, group: Group, here: slice, again: dict[str, Tensor] | None) -> Tensor:
        """One block decoded, into the memory of the one before where no gradient needs that: fresh pages cost more
        than what is written to them."""
        out = None
        if again is not None:
            if name not in again:
                shape = (*group.rows[name].shape[:2], here.stop - here.start, self.dims[name])
                again[name] = torch.empty(shape, dtype=self.wide, device=group.index.device)
            out = again[name][:, :, : here.stop - here.start]
        return self.decode(name, part_of(group, name, here), group.index, out)

    def _rows_at(self, group: Group, name: str, at: Tensor) -> dict[str, Tensor]:
        part = part_of(group, name, slice(group.start, group.start + group.length))
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
        sums = self.sums(group, queries, scoring)
        coded = group.length
        if group.first is not None:
            coded = max(0, min(coded, self._first - group.first))
        elif not self.kept:
            coded = 0
        far = slots.masked_fill(slots >= self._first, -1)
        again: dict[str, Tensor] | None = None if torch.is_grad_enabled() and queries.requires_grad else {}
        for here, own in self._blocks(group, coded, r * n):
            mask = with_bias(seen.allowed(rows, far[:, :, own]), None if bias is None else bias[:, :, own])
            self.add(sums, group, here, mask, again)
        if recent.length:
            near, added = self._near(slots, bias)
            keys, values = (recent.view(name).index_select(1, group.index).to(self.wide) for name in NAMES)
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


def part_of(group: Group, name: str, here: slice) -> dict[str, Tensor]:
    return {k: group.rows[k][:, :, here] for k in (name, f"{name}_range") if k in group.rows}


class Sums:
    """Softmax over entries that come in parts: the largest score so far, and the sums relative to it."""

    def __init__(self, queries: Tensor, value_dim: int, scoring: Scoring, dtype: torch.dtype) -> None:
        self.queries, self.scoring = queries.to(dtype), scoring
        self.narrow: Tensor | None = None
        self.top = self.queries.new_full((*queries.shape[:-1], 1), torch.finfo(dtype).min)
        self.total = torch.zeros_like(self.top)
        self.out = self.queries.new_zeros((*queries.shape[:-1], value_dim))

    def add(self, keys: Tensor, values: Tensor, mask: Tensor | None, queries: Tensor | None = None) -> None:
        """keys, values [b, g, m, d]; mask [b or 1, g or 1, n, m]. queries: those that meet keys of another width."""
        scores = masked_scores(self.queries if queries is None else queries, keys, self.scoring, mask)
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
