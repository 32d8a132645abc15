"""Runs the properties over the patterns that a card declares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.testing.case import Case, Oracle, Violation
from manyheads.testing.properties import PROPERTIES


@dataclass(frozen=True)
class Finding:
    """One property under one pattern. size: the smallest n of those tried at which it fails, None where it holds."""

    property: str
    claim: str
    pattern: str
    holds: bool
    size: int | None = None
    message: str = ""


def examine_mechanism(
    cls: type[Mechanism],
    *,
    patterns: Iterable[str] | None = None,
    properties: Iterable[str] | None = None,
    config: Mapping[str, Any] | None = None,
    oracle: Oracle | None = None,
    device: str = "cpu",
    largest: int | None = None,
) -> Iterator[Finding]:
    """Yields a Finding for each property that applies, under each declared pattern (or those given).

    properties: names, by default all. config: constructor arguments to use besides the card's example. oracle:
    (module, x, context) -> output in float64, an independent computation to be equal to. largest: the longest input to
    try, for a quick look (a property's shortest is always tried); all without it.
    """
    known = {prop.name for prop in PROPERTIES}
    wanted = known if properties is None else set(properties)
    if wanted - known:
        raise ValueError(f"unknown properties {sorted(wanted - known)}; want some of {sorted(known)}")
    chosen = sorted(cls.card.patterns) if patterns is None else list(patterns)
    if strange := [name for name in chosen if name not in cls.card.patterns]:
        raise ValueError(
            f"{cls.card.name} declares no pattern {strange[0]!r}; want some of {sorted(cls.card.patterns)}"
        )
    for pattern in chosen:
        case = Case(cls, Pattern(pattern), dict(config or {}), device, oracle)
        for prop in PROPERTIES:
            if prop.name in wanted and _applies(prop, case):
                yield _examine(prop, case, largest)


def _applies(prop: Any, case: Case) -> bool:
    try:
        return bool(prop.applies(case))
    except Exception:
        return True  # it cannot even be built: the property itself will say why


def _examine(prop: Any, case: Case, largest: int | None) -> Finding:
    sizes = [n for n in prop.sizes if largest is None or n <= largest] or prop.sizes[:1]
    with torch.random.fork_rng(devices=[]):
        for size in sizes:
            case.seeds(size)
            try:
                prop.check(case, size)
            except Violation as violation:
                message = str(violation)
            except Exception as error:
                message = f"raised {type(error).__name__}: {error}"
            else:
                continue
            return Finding(prop.name, prop.claim, case.pattern.value, False, size, f"n={size}: {message}")
    return Finding(prop.name, prop.claim, case.pattern.value, True)


def check_mechanism(cls: type[Mechanism], **options: Any) -> None:
    """Raises AssertionError with every property that fails, and the smallest input at which it does.

    options: those of examine_mechanism.
    """
    failures = [finding for finding in examine_mechanism(cls, **options) if not finding.holds]
    if failures:
        lines = [f"  {f.pattern}: {f.property} ({f.claim})\n    {f.message}" for f in failures]
        raise AssertionError(f"{cls.card.name} fails {len(failures)} properties\n" + "\n".join(lines))
