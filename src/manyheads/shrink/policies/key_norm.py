"""Key norm: keys of small norm draw the most attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy


@dataclass(kw_only=True)
class KeyNorm(Policy):
    """Claim: a key's L2 norm tells, with no query, how much attention it will get: the smaller the more.

    score(t) = -||k_t||, [b, g, m]. Source: arXiv 2406.11430. Nothing is protected, as there; the paper leaves the first
    two layers dense, which a caller of several policies may do.
    """

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Norms are kept beside the entries where decoding asks for them at every token."""
        return () if self.is_full or not self.acts(decoding=True) else ("norm",)

    def observe(self, view: View) -> None:
        if not self.notes:
            return
        new = min(view.group.length, sum([done.queries.shape[3] for done in view.passes]))
        at = view.group.length - new
        view.note("norm").narrow(2, at, new).copy_(_norm(view.keys.narrow(2, at, new)))

    def worst(self, view: View) -> Tensor | int:
        return view.note("norm").argmax(-1) if self.notes else super().worst(view)

    def score(self, view: View) -> Tensor:
        return -(view.note("norm") if self.notes else _norm(view.keys))


def _norm(keys: Tensor) -> Tensor:
    return torch.linalg.vector_norm(keys, dim=-1, dtype=torch.promote_types(keys.dtype, torch.float32))
