"""Key norm: keys of small norm draw the most attention."""

from __future__ import annotations

from dataclasses import dataclass

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
        if self.notes:
            new = min(view.group.length, sum(done.queries.shape[3] for done in view.passes))
            view.note("norm")[:, :, -new:] = view.keys[:, :, -new:].float().norm(dim=-1)

    def score(self, view: View) -> Tensor:
        return -(view.note("norm") if self.notes else view.keys.float().norm(dim=-1))
