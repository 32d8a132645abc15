"""Heads of one length in one buffer.

Legend: b batch, g heads of a group, m entries held, L entries kept, d head dim. An entry is a key, its value, its slot
(the index of its token in everything that was fed, -1 where a row holds nothing) and whatever a policy notes beside it.
Order inside a buffer means nothing once slots are explicit: an evicted entry's place is taken by the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from manyheads.hosts.attend import lies_by_feature

if TYPE_CHECKING:
    from manyheads.hosts.attend import Scoring
    from manyheads.hosts.visibility import Visibility

# Room for tokens to come: a 32nd of what is held. Growing then copies 32 entries per token, a trifle beside the
# attention that reads them all, and memory never stands more than 3% above need.
GROWTH = 32
LEAST_ROOM = 32
# Room that heads of this length are given.
Spare = Callable[[int, list[int]], int]


def room_like(row: Tensor, heads: int, capacity: int) -> Tensor:
    """An empty buffer [b, heads, capacity, ...] for more of such rows, laid out as attention reads it fastest."""
    if lies_by_feature(row):
        return row.new_empty((row.shape[0], heads, row.shape[3], capacity)).transpose(2, 3)
    return row.new_empty((row.shape[0], heads, capacity, *row.shape[3:]))


def room_for(length: int, heads: list[int] | None = None) -> int:
    """Entries of room beyond a length, where nothing says how far its heads will grow."""
    return max(LEAST_ROOM, length // GROWTH)


class Group:
    """Heads of one length in one buffer. rows: name -> [b, g, capacity, ...]; entries are start .. start + length."""

    def __init__(
        self, heads: list[int], rows: dict[str, Tensor], length: int, *, first: int | None, filled: bool = True
    ):
        self.heads = heads
        self.rows = rows
        self.length = length
        self.start = 0
        # Slot of the first entry while nothing but the oldest was dropped: slots are then counted, not stored.
        self.first = first
        # Whether every row holds an entry at every place.
        self.filled = filled
        # False while the tensors are the model's own, which must not be written to.
        self.owned = True
        # What keys and values are coded by, where they are.
        self.codec: Codec | None = None
        self.index = torch.tensor(heads, device=rows["keys"].device)
        self.in_order = heads == list(range(len(heads)))
        # Where heads that stand side by side begin among the layer's.
        self._begin = heads[0] if heads == list(range(heads[0], heads[0] + len(heads))) else None
        # Capacity and length at which the buffer was found to stand no more above its need than it may.
        self.fitted: tuple[int, int] | None = None
        # Places from the oldest entry to the newest, but for the first `_skipped`; None where it is not known.
        self._queue: deque[int] | None = None
        self._skipped = 0

    @property
    def simple(self) -> bool:
        """Whether every place of every row holds an entry, as it is, in a buffer of the group's own."""
        return self.filled and self.owned and self.codec is None

    @property
    def nbytes(self) -> int:
        return sum(row.numel() * row.element_size() for row in self.rows.values())

    @property
    def capacity(self) -> int:
        return self.rows["keys"].shape[2]

    @property
    def value_dim(self) -> int:
        return self.rows["values"].shape[3] if self.codec is None else self.codec.value_dim()

    def view(self, name: str) -> Tensor:
        """[b, g, m, ...]: what is held itself, or keys and values decoded from it; written to by `put` alone."""
        if self.codec is not None and name in ("keys", "values"):
            return self.codec.view(self, name)
        return self.rows[name].narrow(2, self.start, self.length)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The keys held [b * g, d, m] and the values [b * g, m, dv], where nothing is coded; not to be written to."""
        found = []
        for name in ("keys", "values"):
            row = self.rows[name]
            (b, g, _, d), (over, head, entry, feature) = row.shape, row.stride()
            if b > 1 and over != g * head:
                row = self.view(name).flatten(0, 1)
                found.append(row.transpose(1, 2) if name == "keys" else row)
                continue
            # One operation in the place of three.
            size, step = [d, self.length], [feature, entry]
            size, step = (size, step) if name == "keys" else (size[::-1], step[::-1])
            found.append(row.as_strided((b * g, *size), (head, *step), row.storage_offset() + self.start * entry))
        return found[0], found[1]

    def slots(self) -> Tensor:
        """[b, g, m] of the tokens held ([1, 1, m] while they are counted)."""
        if self.first is None:
            return self.view("slots")
        device = self.rows["keys"].device
        return torch.arange(self.first, self.first + self.length, device=device, dtype=torch.int32)[None, None]

    def bias(self) -> Tensor | None:
        """[b, g, m] that is added to the entries' scores, None while nothing was merged."""
        return self.view("bias") if "bias" in self.rows and self.first is None else None

    def own_of(self, rows: Tensor) -> Tensor:
        """Its heads of all of the layer's, [b, H, ...] -> [b, g, ...]."""
        if self._begin is None:
            return rows.index_select(1, self.index)
        return rows.narrow(1, self._begin, len(self.heads))

    def put(self, name: str, at: Tensor, new: Tensor) -> None:
        """Overwrites the entries at the places `at` [b, g, s] by new [b, g, s, ...]."""
        if not self.owned:
            self._move(self.length)
        if self.codec is not None and name in ("keys", "values"):
            self.codec.put(self, name, at, new)
            return
        at = at.reshape(*at.shape, *(1,) * (new.dim() - 3)).expand(new.shape)
        held = self.view(name)
        held.scatter_(2, at, new.to(held.dtype))

    def pick(self, name: str, at: Tensor) -> Tensor:
        """The entries at the places `at` [b, g, s], [b, g, s, ...]."""
        if self.codec is not None and name in ("keys", "values"):
            return self.codec.pick(self, name, at)
        held = self.view(name)
        at = at.reshape(*at.shape, *(1,) * (held.dim() - 3)).expand(*at.shape, *held.shape[3:])
        return held.gather(2, at)

    def explicit(self) -> None:
        """Writes counted slots down, before entries leave in any order."""
        if self.first is None:
            return
        keys = self.rows["keys"]
        slots = keys.new_full(keys.shape[:3], -1, dtype=torch.int32)
        slots[:, :, self.start : self.start + self.length] = self.slots()
        self.rows["slots"], self.first = slots, None

    def append(self, new: dict[str, Tensor], slot: int, spare: Spare) -> None:
        """new: name -> [b, g, n, ...] of the tokens at slot, slot + 1, ... Asks for spare room when it runs out."""
        count = new["keys"].shape[2]
        if self.start + self.length + count > self.capacity or not self.owned:
            self._move(self.length + count + max(spare(self.length, self.heads), 0))
        end = self.start + self.length
        for name in ("keys", "values"):
            row, added = self.rows[name], new[name]
            if row.dtype != added.dtype:
                # As in the dense cache: what comes wider (a prompt under autocast, the rest without) stays wide.
                self.rows[name] = row.to(torch.promote_types(row.dtype, added.dtype))
        for name, row in self.rows.items():
            place = row.narrow(2, end, count)
            if name in new:
                place.copy_(new[name])
            elif name != "slots":
                place.zero_()
            elif count == 1:
                place.fill_(slot)
            else:
                place.copy_(torch.arange(slot, slot + count, device=row.device))
        if self._queue is not None:
            self._queue.extend(range(self.length, self.length + count))
        self.length += count

    def drop_oldest(self, count: int) -> None:
        """Forgets the first entries, where slots are counted; their place is used again when the buffer is full."""
        assert self.first is not None
        self._queue = None
        self.start, self.length, self.first = self.start + count, self.length - count, self.first + count

    def _move(self, capacity: int) -> None:
        """Moves the entries to the front: of this buffer where that frees enough, else of a longer one."""
        for name, row in list(self.rows.items()):
            held = row[:, :, self.start : self.start + self.length]
            if self.owned and self.start >= self.length and capacity <= row.shape[2]:
                row[:, :, : self.length] = held
                continue
            # One row after the other, so that no more than one of them is ever there twice.
            fresh = room_like(row, row.shape[1], capacity)
            fresh[:, :, : self.length] = held
            self.rows[name] = fresh
            del row, held
        self.start, self.owned = 0, True

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, row in self.rows.items():
            # The layout of a buffer survives a change of its rows where it is changed as it lies.
            lies = row.dim() == 4 and row.stride(3) != 1
            self.rows[name] = change(row.transpose(2, 3)).transpose(2, 3) if lies else change(row)

    def truncate(self, end: int) -> None:
        """Forgets every token from slot `end` on."""
        self._queue = None
        if self.first is not None:
            self.length = max(0, min(self.length, end - self.first))
            return
        keep = (self.view("slots") < end) & (self.view("slots") >= 0)
        self.evict(keep, int(keep.sum(-1).max()))

    def evict(self, keep: Tensor, length: int) -> None:
        """Keeps the entries where keep [b, g, m] is True, at most `length` for any row and head; in place."""
        self.explicit()
        self._queue = None
        drop = self.length - length
        places = self.view("slots")
        places.masked_fill_(~keep, -1)
        self.filled = self.filled and bool((keep.sum(-1) == length).all())
        if drop and length:
            holes, hole = (~keep[..., :length]).byte().topk(min(drop, length))
            moves, move = keep[..., length:].byte().topk(min(drop, length))
            # A hole with nothing to fill it is written onto itself.
            source = torch.where((moves * holes).bool(), move + length, hole)
            for row in self.rows.values():
                shape = (*hole.shape, *row.shape[3:])
                here = row[:, :, self.start : self.start + self.length]
                at = [i.reshape(*i.shape, *(1,) * (row.dim() - 3)).expand(shape) for i in (source, hole)]
                here.scatter_(2, at[1], here.gather(2, at[0]))
        self.length = length

    def replace(self, hole: Tensor | int) -> None:
        """Drops the entries at places `hole` [b, g], or at one place of all heads, where the last ones then stand."""
        self.explicit()
        last, at = self.start + self.length - 1, 0
        if isinstance(hole, int):
            at = self.start + hole
        elif self.start:
            hole = hole + self.start
        known: dict[tuple[int, ...], Tensor] = {}
        for row in self.rows.values():
            if isinstance(hole, int):
                row.select(2, at).copy_(row.select(2, last))
                continue
            inner = tuple(row.shape[3:])
            if inner not in known:
                known[inner] = hole.view(*hole.shape, *(1,) * (row.dim() - 2)).expand(*hole.shape, 1, *inner)
            end = row.narrow(2, last, 1)
            # One row of one head lies in one piece, which scatter sees to be its own and refuses.
            row.scatter_(2, known[inner], end.clone() if hole.numel() == 1 else end)
        self.length -= 1
        queue, self._queue = self._queue, None
        if queue and isinstance(hole, int) and queue[0] == hole and queue[-1] == self.length:
            queue.popleft()
            if queue:
                queue[-1] = hole
            self._queue = queue

    def oldest(self, skip: int) -> int | None:
        """The place of the oldest entry but for the first `skip` places, which hold the oldest of all; None where rows
        or heads hold different tokens. Found without a look at the tensors while entries come and go one by one."""
        if self._queue is None or self._skipped != skip:
            slots = self.slots()
            same = slots[0, 0]
            if not self.filled or not bool((slots == same).all()):
                return None
            order = same.argsort().tolist()
            if sorted(order[:skip]) != list(range(skip)):
                return None
            self._queue, self._skipped = deque(order[skip:]), skip
        return self._queue[0] if self._queue else None

    def extract(self, keep: Tensor, members: list[int], length: int, spare: int) -> Group:
        """A group of its own for some of the heads (places in this group), holding what keep [b, g, m] says."""
        chosen = torch.tensor(members, device=keep.device)
        keep = keep.index_select(1, chosen)
        order = keep.byte().argsort(dim=-1, descending=True, stable=True)[..., :length]
        held = keep.gather(2, order)
        rows = {}
        for name, row in self.rows.items():
            source = row[:, :, self.start : self.start + self.length].index_select(1, chosen)
            at = order.reshape(*order.shape, *(1,) * (row.dim() - 3)).expand(*order.shape, *row.shape[3:])
            fresh = room_like(row, order.shape[1], length + spare)
            fresh[:, :, :length] = source.gather(2, at)
            rows[name] = fresh
        slots = self.slots().expand(keep.shape[0], len(self.heads), -1).index_select(1, chosen).gather(2, order)
        rows["slots"] = order.new_full((*order.shape[:2], length + spare), -1, dtype=torch.int32)
        rows["slots"][:, :, :length] = slots.masked_fill(~held, -1)
        own = Group([self.heads[i] for i in members], rows, length, first=None, filled=bool(held.all()))
        own.codec = self.codec
        return own


def side_by_side(groups: list[Group], parts: list[Tensor]) -> Tensor:
    """[b, H, ...] in the order of heads, from each group's part [b, g, ...]."""
    turn = sorted(range(len(groups)), key=lambda i: groups[i].heads[0])
    heads = [head for i in turn for head in groups[i].heads]
    out = torch.cat([parts[i] for i in turn], 1)
    if heads == list(range(len(heads))):
        return out
    order = sorted(range(len(heads)), key=heads.__getitem__)
    return out.index_select(1, torch.tensor(order, device=out.device))


class Codec(Protocol):
    """What codes the keys and values of one layer; see quantised.py."""

    @property
    def nbytes(self) -> int: ...

    def value_dim(self) -> int: ...

    def entry_nbytes(self) -> int: ...

    def fixed_nbytes(self) -> int: ...

    def adopt(self, new: dict[str, Tensor], slot: int) -> None: ...

    def take(self, new: dict[str, Tensor], slot: int) -> dict[str, Tensor]: ...

    def observe(self, queries: Tensor, seen: Visibility) -> None: ...

    def settle(self, groups: list[Group], spare: Spare, real: Callable[[Tensor], Tensor], pending: int) -> None: ...

    def truncate(self, end: int) -> None: ...

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> None: ...

    def view(self, group: Group, name: str) -> Tensor: ...

    def pick(self, group: Group, name: str, at: Tensor) -> Tensor: ...

    def put(self, group: Group, name: str, at: Tensor, new: Tensor) -> None: ...

    def attend(self, group: Group, queries: Tensor, scoring: Scoring, seen: Visibility) -> Tensor: ...
