"""Which queries meet which keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(slots=True)
class Where:
    """Which queries meet which keys. i: [n] and j: [m], places in the sequence (a state's keys come first). padding:
    [b, m] and dense: [b, 1 or h, n, m] as given by the caller, True = may attend. causal: keys j <= i only.
    counted: nobody gave positions, so that key_positions are j."""

    i: Tensor
    j: Tensor
    query_positions: Tensor
    key_positions: Tensor
    padding: Tensor | None = None
    dense: Tensor | None = None
    causal: bool = False
    counted: bool = False

    @property
    def square(self) -> bool:
        """The queries are all the keys: neither a state nor a context."""
        return self.causal and self.i.shape == self.j.shape

    @property
    def usual(self) -> bool:
        """Whether the keys stand at positions j. While a graph is traced, positions that were given cannot be asked."""
        if self.counted or torch.compiler.is_compiling():
            return self.counted
        return torch.equal(self.key_positions, self.j.expand_as(self.key_positions))

    def allowed(self) -> Tensor | None:
        """What the caller and causality allow, [b or 1, h or 1, n, m]; None where that is everything."""
        allowed = self.dense
        if self.padding is not None:
            padding = self.padding[:, None, None, :]
            allowed = padding if allowed is None else allowed & padding
        if self.causal and self.i.shape[0] + self.j.shape[0] > 2:
            past = (self.j[None, :] <= self.i[:, None])[None, None]
            allowed = past if allowed is None else allowed & past
        return None if allowed is None else allowed.expand(-1, -1, self.i.shape[0], self.j.shape[0])

    def rows(self, rows: slice) -> Where:
        """The same for a slice of the queries."""
        return replace(
            self,
            i=self.i[rows],
            query_positions=self.query_positions[:, rows],
            dense=None if self.dense is None else self.dense[:, :, rows],
        )
