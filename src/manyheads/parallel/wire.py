"""What goes over the wire, and how much of it."""

from __future__ import annotations

import os
import socket
import time
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Bytes that this process sent to others since counting began, and in how many calls."""

    bytes: int = 0
    calls: int = 0


# Not a context variable: the backward pass of a GPU runs in a thread of its own.
_open: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts what the schemes of this package send while it is open."""
    count = Traffic()
    _open.append(count)
    try:
        yield count
    finally:
        _open[:] = [other for other in _open if other is not count]


def sent(size: int) -> None:
    for count in _open:
        count.bytes += size
        count.calls += 1


class Place(NamedTuple):
    """rank of this process among size in a group."""

    rank: int
    size: int
    group: dist.ProcessGroup | None


def place(group: dist.ProcessGroup | None) -> Place:
    if not dist.is_initialized():
        if group is not None:
            raise ValueError("parallel: a group was given without torch.distributed; call init_process_group first")
        return Place(0, 1, None)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("parallel: this process is not in the group that was given; only its members may call")
    return Place(rank, size, group)


class Hop:
    """Tensors on their way to the next process of the ring, and those of the one before on their way here."""

    def __init__(self, tensors: list[Tensor], wanted: list[Tensor], at: Place, *, tag: int) -> None:
        self.received, self._at = wanted, at
        acquaint(at, tensors[0].device)
        # What has no elements is not sent: both ends know the lengths.
        going = [(dist.isend, x.contiguous(), 1, i) for i, x in enumerate(tensors) if x.numel()]
        coming = [(dist.irecv, x, -1, i) for i, x in enumerate(wanted) if x.numel()]
        self._held = [x for _, x, _, _ in going]  # until it has gone
        operations = [
            dist.P2POp(how, x, group=at.group, tag=tag + i, group_peer=(at.rank + step) % at.size)
            for how, x, step, i in going + coming
        ]
        sent(sum(x.nbytes for x in self._held))
        with _named(at):
            self._works: list[Any] = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        with _named(self._at):
            for work in self._works:
                work.wait()
        self._held = []
        return self.received


def swap(going: dict[int, Tensor], coming: dict[int, Tensor], at: Place, device: torch.device) -> None:
    """Sends each of `going` to the process of that number, and fills each of `coming` from there."""
    acquaint(at, device)
    if not going and not coming:
        return
    held = {other: x.contiguous() for other, x in going.items()}
    operations = [dist.P2POp(dist.isend, x, group=at.group, group_peer=other) for other, x in held.items()]
    operations += [dist.P2POp(dist.irecv, x, group=at.group, group_peer=other) for other, x in coming.items()]
    sent(sum(x.nbytes for x in held.values()))
    with _named(at):
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def add_up(x: Tensor, at: Place) -> Tensor:
    """The sum of x over all processes, in every one. Counted as what a ring of processes sends for it."""
    if at.size == 1:
        return x
    acquaint(at, x.device)
    sent(2 * x.nbytes * (at.size - 1) // at.size)
    with _named(at):
        dist.all_reduce(x, group=at.group)
    return x


def all_gather(x: Tensor, at: Place) -> Tensor:
    """x of every process: [size, *x.shape]."""
    if at.size == 1:
        return x[None]
    acquaint(at, x.device)
    found = x.new_empty((at.size, *x.shape))
    sent(x.nbytes * (at.size - 1))
    with _named(at):
        dist.all_gather([*found], x.contiguous(), group=at.group)
    return found


def all_to_all(parts: list[Tensor], wanted: list[int], at: Place) -> list[Tensor]:
    """parts: one flat tensor for each process; wanted: how many elements come from each."""
    if at.size == 1:
        return parts
    acquaint(at, parts[0].device)
    received = parts[0].new_empty(sum(wanted))
    sent(sum(part.nbytes for rank, part in enumerate(parts) if rank != at.rank))
    with _named(at):
        dist.all_to_all_single(received, torch.cat(parts), wanted, [p.numel() for p in parts], group=at.group)
    return list(received.split(wanted))


# By group: the machine and process number of each member, to tell who is gone. A group that has ended is forgotten: a
# new one may get its name and its address, in some processes only.
_known: weakref.WeakKeyDictionary[Any, list[list[int]]] = weakref.WeakKeyDictionary()
# Seconds in which a process that ends may still look alive.
_LAST_BREATH = 2.0


def acquaint(at: Place, device: torch.device) -> None:
    """Before a group's first exchange, of which it is one: its members tell each other which processes they are."""
    if at.size == 1 or _group(at) in _known:
        return
    here = torch.tensor([zlib.crc32(_machine().encode()), os.getpid()], device=device)
    found = [torch.empty_like(here) for _ in range(at.size)]
    with _named(at):
        dist.all_gather(found, here, group=at.group)
    _known[_group(at)] = [x.tolist() for x in found]


def _group(at: Place) -> Any:
    return dist.group.WORLD if at.group is None else at.group


def _machine() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return socket.gethostname()


def _gone(at: Place) -> list[int]:
    """Members that ran on this machine and have ended; none where that cannot be known."""
    group = _group(at)
    members = [] if group is None else _known.get(group, [])
    if not members:
        return []
    mine, end = members[at.rank][0], time.monotonic() + _LAST_BREATH
    while True:
        found = [rank for rank, (machine, number) in enumerate(members) if machine == mine and _ended(number)]
        if found or time.monotonic() > end:
            return found
        time.sleep(0.05)


def _ended(number: int) -> bool:
    try:
        # A process that nobody has waited for is there still, as a zombie.
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return Path("/proc/self/stat").exists()


@contextmanager
def _named(at: Place) -> Iterator[None]:
    """Says who is gone: what the backends raise names an address."""
    try:
        yield
    except RuntimeError as error:
        gone, before, after = _gone(at), (at.rank - 1) % at.size, (at.rank + 1) % at.size
        who = f"process {', '.join(map(str, gone))} has ended" if gone else "none of this machine has ended"
        raise RuntimeError(
            f"parallel: process {at.rank} of {at.size} lost another one, or waited for it too long: {who} (its "
            f"neighbours are {before} and {after}); the first error of all processes says why: {error}"
        ) from error
