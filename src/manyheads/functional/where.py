"""Which queries meet which keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Where:
    """Which queries meet which keys. i: [n] and j: [m], places in the sequence (a state's keys come first). padding:
    [b, m] and dense: [b, 1 or h, n, m] as given by the caller, True = may attend. causal: keys j <= i only."""

    i: Tensor
    j: Tensor
    query_positions: Tensor
    key_positions: Tensor
    padding: Tensor | None = None
    dense: Tensor | None = None
    causal: bool = False

    @property
    def square(self) -> bool:
        """The queries are all the keys: neither a state nor a context."""
        return self.causal and self.i.shape == self.j.shape

    def allowed(self) -> Tensor | None:
        """What the caller and causality allow, [b or 1, h or 1, n, m]; None where that is everything."""
        allowed = self.dense
        if self.padding is not None:
            padding = self.padding[:, None, None, :]
            allowed = padding if allowed is None else allowed & padding
        if self.causal and len(self.i) + len(self.j) > 2:
            past = (self.j[None, :] <= self.i[:, None])[None, None]
            allowed = past if allowed is None else allowed & past
        return None if allowed is None else allowed.expand(-1, -1, len(self.i), len(self.j))

    def rows(self, rows: slice) -> Where:
        """The same for a slice of the queries."""
        return replace(
            self,
            i=self.i[rows],
            query_positions=self.query_positions[:, rows],
            dense=None if self.dense is None else self.dense[:, :, rows],
        )
