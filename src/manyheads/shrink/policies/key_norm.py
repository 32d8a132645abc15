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

    def score(self, view: View) -> Tensor:
        return -view.keys.float().norm(dim=-1)
