"""Policies that stand on another's scores: ChunkKV, CriticalKV."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from manyheads.shrink.compress import View
from manyheads.shrink.policies.snapkv import SnapKV
from manyheads.shrink.policy import Policy
from manyheads.shrink.rules import Rules

_SHARED = ("compression_ratio", "budget_tokens", "budget_bytes", "budget_per", "when", "interval")


@dataclass(kw_only=True)
class Based(Policy):
    """base: the policy whose scores are taken, with settings of its own and no budget, which is this policy's."""

    base: Policy = field(default_factory=SnapKV)
    when: str = "prefill"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.base, Policy):
            raise ValueError(f"{name}: base is a policy such as SnapKV(window_size=32); got {self.base!r}")
        base = type(self.base)
        scores = base.score is not Rules.score and not (
            base.reads or base.weighted or base.evicts_before or base.by_layer or not base.drops_alone
        )
        if not scores:
            raise ValueError(
                f"{name}: base={base.__name__} gives no score to every token that could be taken; take SnapKV, TOVA, "
                "H2O, KeyNorm, KeyDiff, LagKV, CUR or ExpectedAttention"
            )
        shared = {f.name for f in fields(Rules)} - {"when"}
        own = [f for f in fields(self.base) if f.name in shared and getattr(self.base, f.name) != f.default]
        if own:
            raise ValueError(
                f"{name}: {own[0].name} is {name}'s own to say, {name}(base={base.__name__}(...), "
                f"{own[0].name}={getattr(self.base, own[0].name)!r}); leave it out of the base"
            )
        super().__post_init__()
        # The base's rule may ask for its budget.
        self._scorer = replace(self.base, **{key: getattr(self, key) for key in _SHARED})

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self._scorer.notes

    @property
    def moves(self) -> bool:
        return not self.is_full and "cache" in (self.positions, self.base.positions)

    @property
    def looks_back(self) -> int:
        return self._scorer.looks_back

    @property
    def smallest(self) -> int:
        return self.base.smallest

    def prepare(self, model: Any, cache: Any) -> None:
        self._scorer.prepare(model, cache)

    def observe(self, view: View) -> None:
        if self._scorer.observes:
            self._scorer.observe(view)

    def placed(self, layer: Any, view: View) -> None:
        self._scorer.placed(layer, view)
