"""H2O: heavy hitters, and the recent half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy


@dataclass(kw_only=True)
class H2O(Policy):
    """Claim: a few tokens take most of the attention ever paid; keep them and the recent ones.

    score(t) = sum over all queries so far, and the query heads of a KV head, of softmax(q k_t), [b, g, m]; the latest
    recent_size tokens (default: half of what a head may hold) stay whatever their score.
    Source: arXiv 2306.14048, FMInference/H2O `H2OKVCache_LayerWise`. Attention is summed in blocks of queries; padding
    pays none.
    """

    recent_size: int | None = None
    notes: ClassVar[tuple[str, ...]] = ("mass",)

    def __post_init__(self) -> None:
        if self.recent_size is not None and (not isinstance(self.recent_size, int) or self.recent_size < 0):
            raise ValueError(f"H2O: recent_size must be a whole number of at least 0; got {self.recent_size!r}")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return 2 if self.recent_size is None else self.recent_size + 1

    def observe(self, view: View) -> None:
        view.note("mass").add_(view.received())

    def worst(self, view: View) -> Tensor | int:
        """Asked where nothing is padding: a slot is a position then."""
        recent = view.total - self._recent(view)
        mass = view.note("mass")
        return mass.masked_fill(view.group.slots() >= recent, torch.finfo(mass.dtype).max).argmin(-1)

    def score(self, view: View) -> Tensor:
        mass, recent = view.note("mass"), self._recent(view)
        newest = view.count[:, None, None] - view.positions - 1
        return mass.masked_fill(newest < recent, torch.finfo(mass.dtype).max)

    def _recent(self, view: View) -> Tensor:
        if self.recent_size is not None:
            return torch.tensor(self.recent_size, device=view.keys.device)
        assert view.targets is not None
        return view.targets[..., None] // 2
