"""Entries in the order of the text, for rules that look at neighbours or at stretches of it.

Legend: b batch, g heads of a group, m entries held. A buffer holds entries in any order, and padding among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from manyheads.shrink.compress import View


@dataclass
class TextOrder:
    """order [b, g, m]: places of the entries from the first of the text to the last, dead ones behind them all."""

    order: Tensor
    count: Tensor  # [b, g]: entries that live

    @classmethod
    def of(cls, view: View) -> TextOrder:
        order = view.slots.masked_fill(~view.alive, 2**30).argsort(dim=-1, stable=True)
        return cls(order, view.alive.sum(-1))

    @cached_property
    def rank(self) -> Tensor:
        """[b, g, m]: how many living entries stand before each."""
        ranks = torch.arange(self.order.shape[-1], device=self.order.device).expand_as(self.order)
        return torch.empty_like(self.order).scatter_(-1, self.order, ranks)

    def sort(self, rows: Tensor) -> Tensor:
        """Rows [b, g, m, ...] as they stand in the text."""
        at = self.order.reshape(*self.order.shape, *(1,) * (rows.dim() - 3)).expand(*self.order.shape, *rows.shape[3:])
        return rows.gather(2, at)

    def unsort(self, score: Tensor) -> Tensor:
        """Scores [b, g, m] in the order of the text, back at the entries' places."""
        return torch.empty_like(score).scatter_(-1, self.order, score)


def one_text(view: View, name: str) -> None:
    """A ValueError where rows hold several documents, which a rule that compares tokens with each other would mix."""
    seen = view.passes[-1].seen
    if not seen.plain and seen.tensor is None:
        raise ValueError(
            f"{name} compares a row's tokens with each other, and these rows hold several documents or see both ways "
            "(position_ids that start again, block_sequence_ids); give every document a row of its own"
        )


def wide(rows: Tensor) -> Tensor:
    """In float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def whole_number(name: str, field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: {field} must be a whole number of at least {least}; got {value!r}")
