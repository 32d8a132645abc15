"""Ragged storage of one layer: every KV head keeps its own number of entries, and equally long heads share a buffer.

Legend: b batch, m entries held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from manyheads.shrink.group import Codec, Group, Spare, room_for, room_like


class Store:
    """All the heads of one layer, in groups of one length each."""

    def __init__(self, codec: Codec | None = None) -> None:
        self.groups: list[Group] = []
        self.codec = codec

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups) + (0 if self.codec is None else self.codec.nbytes)

    @property
    def heads(self) -> int:
        groups = self.groups
        return len(groups[0].heads) if len(groups) == 1 else sum(len(group.heads) for group in groups)

    def entry_nbytes(self) -> int:
        """Bytes of an entry, its slot included."""
        rows = {k: row for k, row in self.groups[0].rows.items() if k != "slots"}
        coded = 0
        if self.codec is not None:
            coded = self.codec.entry_nbytes()
            rows = {k: row for k, row in rows.items() if not k.startswith(("keys", "values"))}
        return coded + sum(row[0, 0, :1].numel() * row.element_size() for row in rows.values()) + 4

    def lengths(self) -> list[int]:
        """Entries held per head."""
        held = {head: group.length for group in self.groups for head in group.heads}
        return [held[head] for head in sorted(held)]

    def append(self, new: dict[str, Tensor], slot: int, spare: Spare = room_for) -> None:
        if not self.groups:
            assert self.codec is None
            heads, count = new["keys"].shape[1:3]
            room = spare(count, list(range(heads)))
            rows = {name: room_like(row, row.shape[1], count + room) for name, row in new.items()}
            self.groups = [Group(list(range(heads)), rows, 0, first=slot)]
        if self.codec is not None:
            new = self.codec.take(new, slot)
        if len(self.groups) == 1 and self.groups[0].in_order:
            self.groups[0].append(new, slot, spare)
            return
        for group in self.groups:
            group.append({k: group.own_of(row) for k, row in new.items()}, slot, spare)

    def adopt(self, new: dict[str, Tensor], slot: int) -> None:
        """Takes the tensors of a first pass as they are: for a pass after which most of them will be dropped."""
        self.groups = [Group(list(range(new["keys"].shape[1])), dict(new), new["keys"].shape[2], first=slot)]
        self.groups[0].owned = False
        if self.codec is not None:
            self.codec.adopt(new, slot)

    def own(self, spare: Spare = room_for) -> None:
        """Copies what is still the model's own, with room for more; what is to be coded is not copied first."""
        if self.codec is not None:
            return
        for group in self.groups:
            if not group.owned:
                group._move(group.length + spare(group.length, group.heads))

    def evict(self, keeps: list[Tensor | None], spare: Spare = room_for, slack: int = 0) -> None:
        """keeps: for every group the entries [b, g, m] that stay, None for all. Heads cut to one length come together.

        Small evictions happen in place; a buffer that would stand more than `slack` above its need is made anew.
        """
        groups: list[Group] = []
        parts: dict[int, list[Group]] = {}
        for group, keep in zip(self.groups, keeps, strict=True):
            if keep is None:
                groups.append(group)
                continue
            lengths = keep.sum(-1).amax(0).tolist()
            longest = max(lengths)
            if (
                group.owned
                and len(set(lengths)) == 1
                and group.capacity <= longest + spare(longest, group.heads) + slack
            ):
                group.evict(keep, longest)
                groups.append(group)
                continue
            for length in sorted(set(lengths)):
                members = [i for i, own in enumerate(lengths) if own == length]
                room = spare(length, [group.heads[i] for i in members])
                parts.setdefault(length, []).append(group.extract(keep, members, length, room))
        self.groups = groups + [_join(own) for _, own in sorted(parts.items())]

    def truncate(self, end: int) -> None:
        for group in self.groups:
            group.truncate(end)
        if self.codec is not None:
            self.codec.truncate(end)

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for group in self.groups:
            group.on_batch(change)
        if self.codec is not None:
            self.codec.on_batch(change)


def _join(parts: Iterable[Group]) -> Group:
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    heads = [head for part in parts for head in part.heads]
    rows = {}
    for name, row in parts[0].rows.items():
        rows[name] = room_like(row, len(heads), row.shape[2])
        torch.cat([part.rows[name] for part in parts], 1, out=rows[name])
    joined = Group(heads, rows, parts[0].length, first=None, filled=all(part.filled for part in parts))
    joined.codec = parts[0].codec
    return joined
