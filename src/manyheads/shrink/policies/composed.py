"""Composed: several policies on one cache."""

from __future__ import annotations

from typing import Any

from manyheads.shrink.policy import Policy
from manyheads.shrink.rules import Rules


class Composed(Policy):
    """Claim: policies that act at other moments, or by other rules, may share a cache, such as
    Composed(SnapKV(compression_ratio=0.5), TOVA(budget_tokens=512, when="decode")).

    After each pass every part takes notes, then each in turn drops to its own budget what the earlier ones left; each
    budget counts all tokens fed, so that after a pass at which all act the tightest holds.
    Source: the classes ComposedPress and PrefillDecodingPress of NVIDIA/kvpress; there ratios multiply, here none does.
    """

    def __new__(cls, *parts: Policy) -> Any:
        return object.__new__(cls)

    def __init__(self, *parts: Policy) -> None:
        self._parts = parts
        self._check()
        super().__init__()
        stored = [own.storage for own in parts if own.storage is not None]
        self.storage = stored[0] if stored else None
        self.protect = next((own.protect for own in parts if own.protect is not None), None)
        again = [type(own).__name__ for own in parts if own.when != "prefill"]
        if self.storage is not None and self.moves and again:
            raise ValueError(
                f"Composed: {' and '.join(again)} would move keys again and again (positions='cache'), and coding them "
                "anew each time would add up errors: give all parts when='prefill', or leave storage out"
            )

    def _check(self) -> None:
        parts = self._parts
        if len(parts) < 2 or not all(isinstance(own, Policy) for own in parts):
            raise ValueError(f"Composed takes two policies or more; got {', '.join(map(repr, parts)) or 'none'}")
        for own in parts:
            if own.reads or isinstance(own, Composed):
                raise ValueError(
                    f"Composed: {type(own).__name__} {'drops nothing' if own.reads else 'has parts of its own'}; give "
                    "policies that drop entries, each by itself"
                )
        turning = [own for own in parts if own.positions == "cache"]
        notes = [name for own in parts for name in own.notes]
        once = {
            "share out a budget": [own for own in parts if own.allocation is not None],
            "store keys as codes": [own for own in parts if own.storage is not None],
            "set layers up in their own way": [own for own in parts if type(own).prepare is not Rules.prepare],
            "turn keys": turning if not all(own.moves for own in turning) else [],
            "keep the same notes": [own for own in parts if any(notes.count(name) > 1 for name in own.notes)],
        }
        for what, found in once.items():
            if len(found) > 1:
                names = " and ".join(type(own).__name__ for own in found)
                raise ValueError(f"Composed: {names} both {what}, which a cache does once; leave one of them out")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Composed) and self._parts == other._parts

    def __repr__(self) -> str:
        return f"Composed({', '.join(map(repr, self._parts))})"

    __hash__ = None  # type: ignore[assignment]

    @property
    def parts(self) -> tuple[Rules, ...]:
        return self._parts

    @property
    def is_full(self) -> bool:
        return all(own.is_full for own in self._parts)

    @property
    def smallest(self) -> int:
        return max(own.smallest for own in self._parts)

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for own in self._parts for name in own.notes)

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        return any(own.weighted for own in self._parts)

    @property
    def moves(self) -> bool:
        """Where one part moves keys up, they are after each part's drops."""
        return any(own.moves for own in self._parts)

    @property
    def evicts_before(self) -> bool:  # type: ignore[override]
        return any(own.evicts_before for own in self._parts)

    def acts(self, *, decoding: bool, context: bool = False) -> bool:
        return any(own.acts(decoding=decoding, context=context) for own in self._parts if not own.is_full)

    def room(self, layer: Any) -> int | None:
        return None

    def check_layers(self, layers: int) -> None:
        for own in self._parts:
            own.check_layers(layers)

    def prepare(self, model: Any, cache: Any) -> None:
        for own in self._parts:
            own.prepare(model, cache)

    def to_dict(self) -> dict[str, Any]:
        return {"parts": [{"name": type(own).__name__, **own.to_dict()} for own in self._parts]}
