"""Which tokens of a sequence are whose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from manyheads.parallel.wire import Place, all_gather, place

Kind = Literal["contiguous", "zigzag"]


class Piece(NamedTuple):
    """Tokens that follow each other: from `start` in a process's shard, from `first` in the sequence."""

    start: int
    first: int
    size: int


@dataclass(frozen=True)
class Layout:
    """A sequence of `length` tokens over a group of processes (None: all, or one without torch.distributed).

    contiguous: process r holds the r-th of P parts. zigzag: of 2 P parts the r-th and the one as far from the end, so
    that in causal attention all have the same work. Parts differ by at most one token; a sequence may be shorter than
    the processes are many, and some then hold nothing. Every process makes the same layout: it takes no communication.

    Positions (rotary and others) must be those of the tokens: `index()`, and not 0, 1, 2.
    """

    length: int
    kind: Kind = "zigzag"
    group: dist.ProcessGroup | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ("contiguous", "zigzag"):
            raise ValueError(f"Layout: kind={self.kind!r} was given; want 'contiguous' or 'zigzag'")
        if self.length < 1:
            raise ValueError(
                f"Layout: length={self.length} was given; want the tokens of the whole sequence, at least 1"
            )

    @property
    def place(self) -> Place:
        return place(self.group)

    def pieces(self, rank: int | None = None) -> list[Piece]:
        """What a process holds, this one if none is named; empty pieces are left out."""
        at = self.place
        rank = at.rank if rank is None else rank
        parts = at.size * (2 if self.kind == "zigzag" else 1)
        mine = [rank] if self.kind == "contiguous" else [rank, parts - 1 - rank]
        found, start = [], 0
        for part in mine:
            first, end = (self.length * edge // parts for edge in (part, part + 1))
            if end > first:
                found.append(Piece(start, first, end - first))
                start += end - first
        return found

    def count(self, rank: int | None = None) -> int:
        """How many tokens a process holds."""
        return sum(piece.size for piece in self.pieces(rank))

    def index(self, rank: int | None = None) -> Tensor:
        """[count] the numbers of a process's tokens in the sequence."""
        parts = [torch.arange(piece.first, piece.first + piece.size) for piece in self.pieces(rank)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's part of a tensor whose axis `dim` is the whole sequence."""
        if x.shape[dim] != self.length:
            raise ValueError(
                f"Layout: a tensor of shape {tuple(x.shape)} was given; want length {self.length} in axis {dim}"
            )
        return x.index_select(dim, self.index().to(x.device))

    def whole(self, x: Tensor, dim: int = 1) -> Tensor:
        """The tensor of all tokens from every process's part, in order, in every process; carries no gradient."""
        self.check("whole", x.shape[dim])
        size = self.place.size
        # Padded to the longest, so that one call gathers them.
        longest = max(self.count(rank) for rank in range(size))
        x = x.detach().movedim(dim, 0)
        padded = torch.cat((x, x.new_zeros((longest - x.shape[0], *x.shape[1:]))))
        found = all_gather(padded, self.place)
        joined = torch.cat([part[: self.count(rank)] for rank, part in enumerate(found)])
        return joined.index_select(0, self.order().to(x.device)).movedim(0, dim)

    def order(self) -> Tensor:
        """[length] where, among the shards of all processes one after the other, each token stands."""
        return torch.cat([self.index(rank) for rank in range(self.place.size)]).argsort()

    def check(self, name: str, count: int) -> None:
        if count != self.count():
            raise ValueError(
                f"{name}: {count} tokens were given to process {self.place.rank} of {self.place.size}; want its "
                f"{self.count()} of {self.length} in a {self.kind} layout: layout.shard(x) takes them"
            )


class Alone(Layout):
    """A sequence that this process holds whole, whoever else there is."""

    @property
    def place(self) -> Place:
        return Place(0, 1, None)
