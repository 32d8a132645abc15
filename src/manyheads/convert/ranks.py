"""Healing by several processes that a launcher started: rows are shared out, gradients averaged, the first one writes.

    torchrun --nproc-per-node 2 -m manyheads convert --heal 200k --out DIR

`accelerate launch` sets the same variables. Each process holds the whole model and does all else by itself, alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def is_first() -> bool:
    """Whether this process tells and writes: the only one, or the first of those that were launched together."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class Ranks:
    """rank of `world` processes."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """Joins the processes that were launched together, by accelerate, the first time that it is called."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(int(state.process_index), int(state.num_processes))

    def check(self, batch: int) -> None:
        """ValueError where rows of a step cannot be shared out evenly."""
        if batch % self.world:
            raise ValueError(
                f"{self.world} processes for the {batch} rows of a step: launch a number that divides {batch}"
            )

    def own(self, rows: Tensor) -> Tensor:
        """Those of rows [b, ...] that are this process'."""
        return rows[self.rank :: self.world]

    def alike(self, model: Any) -> None:
        """Gives every process the first one's weights and buffers."""
        if self.world > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)

    def average(self, tensors: Iterable[Tensor | None]) -> None:
        """Each tensor becomes the mean over all processes."""
        for tensor in tensors if self.world > 1 else ():
            if tensor is not None:
                torch.distributed.all_reduce(tensor)
                tensor /= self.world
