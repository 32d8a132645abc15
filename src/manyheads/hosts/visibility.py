"""What the queries of a pass may see, as a rule: nothing of size [n, n] is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Visibility:
    """What the queries of one pass may see, by slot: the index of a token in everything fed so far, padding included.

    rule(b, h, i, j) is transformers' mask function on slots, asked for every row of the batch (documents packed into
    rows are cut at other places in each) and, as the library asks it, for head 0; rows [b] are the batch's rows by the
    rule's count. padding [b, total] is True at real tokens, None: all are.
    plain: the rule is causal, within `window` where that is given, and nothing else.
    tensor: a mask that the caller made, [b, 1 or h, n, total]; then the rule is not asked.
    """

    rule: Callable[..., Tensor] | None
    padding: Tensor | None
    offset: int
    window: int | None = None
    plain: bool = True
    tensor: Tensor | None = None
    rows: Tensor | None = None

    def only_causal(self, tokens: int) -> bool:
        """Whether so many tokens in a row hide nothing from each other but the future."""
        return self.plain and self.padding is None and (self.window is None or tokens <= self.window)

    def allowed(self, rows: slice, slots: Tensor) -> Tensor:
        """[b or 1, g or 1, rows, m] for keys at slots [b or 1, g or 1, m]: bool, or a float mask's own numbers."""
        if self.tensor is not None:
            return self._lookup(rows, slots)
        device = slots.device
        j = slots.unsqueeze(2)
        i = torch.arange(rows.start + self.offset, rows.stop + self.offset, device=device)[None, None, :, None]
        if self.plain:
            allowed = j <= i
            if self.window is not None:
                allowed = allowed & (j > i - self.window)
        else:
            assert self.rule is not None
            assert self.rows is not None
            b = self.rows.to(device)[:, None, None, None]
            allowed = self.rule(b, torch.zeros_like(b), i, j.clamp_min(0).long())
        if self.padding is not None:
            allowed = allowed & self.real(slots).unsqueeze(2)
        return allowed & (j >= 0)

    def real(self, slots: Tensor) -> Tensor:
        """Whether slots [b or 1, g or 1, m] hold a token that is not padding."""
        if self.padding is None:
            return slots >= 0
        rows, total = self.padding.shape
        inside = slots.clamp(0, total - 1).long().expand(rows, -1, -1)
        found = self.padding.gather(1, inside.flatten(1)).view(inside.shape)
        return found & (slots >= 0) & (slots < total)

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> Visibility:
        """The same for rows of the batch that were reordered, repeated or left out."""
        padding = None if self.padding is None else change(self.padding)
        tensor = None if self.tensor is None or self.tensor.shape[0] == 1 else change(self.tensor)
        rows = None if self.rows is None else change(self.rows)
        return replace(self, padding=padding, tensor=tensor, rows=rows)

    def part(self, start: int, stop: int) -> Visibility:
        """What these of the pass's queries may see."""
        tensor = None if self.tensor is None else self.tensor[:, :, start:stop]
        return replace(self, offset=self.offset + start, tensor=tensor)

    def _lookup(self, rows: slice, slots: Tensor) -> Tensor:
        assert self.tensor is not None
        mask = self.tensor[:, :, rows]
        total = mask.shape[-1]
        b, g = max(mask.shape[0], slots.shape[0]), max(mask.shape[1], slots.shape[1])
        at = slots.clamp(0, total - 1).long().unsqueeze(2).expand(b, g, mask.shape[2], -1)
        found = mask.expand(b, g, -1, -1).gather(3, at)
        outside = ((slots < 0) | (slots >= total)).unsqueeze(2)
        return found.masked_fill(outside, False if found.dtype == torch.bool else torch.finfo(found.dtype).min)
