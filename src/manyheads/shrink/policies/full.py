"""Full: nothing is dropped."""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.shrink.policy import Policy


@dataclass(kw_only=True)
class Full(Policy):
    """Claim: the dense cache, faster. Buffers grow ahead of need instead of being copied for every token, and keys are
    never repeated for the query heads that share them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_full:
            raise ValueError("Full keeps everything: it takes no budget; choose a policy that drops entries")
