"""How a cost grows with the length: a power fitted with its interval, or a word on why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

# Two-sided 95% of Student's t by degrees of freedom; the last stands for all above it, which is to the safe side.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
WIDEST = 0.5  # of an interval: beyond it n and n^1.5 would not be told apart
TOO_NOISY, TOO_FEW = "too noisy", "too few lengths"


@dataclass(frozen=True)
class Growth:
    """exponent: p of y ~ x^p, None where the points do not support one. interval: 95% of it. span: the lengths used.
    note: '' or why there is no exponent."""

    exponent: float | None = None
    interval: tuple[float, float] | None = None
    span: tuple[int, int] | None = None
    note: str = ""


def fitted_growth(points: Iterable[tuple[int, int, float]]) -> Growth:
    """p of y ~ x^p by least squares on logarithms, from (turn, x, y) at the upper half of the lengths, or three.

    What slows a whole turn down is no growth: each turn has a level of its own, and the interval is what is left of
    scatter within the turns, of the timings and about a straight line alike. Below zero no time or memory grows.
    """
    known = [(turn, x, y) for turn, x, y in points if x > 0 and y > 0]
    lengths = sorted({x for _, x, _ in known})
    used = lengths[max(0, min(len(lengths) // 2, len(lengths) - 3)) :]
    turns: dict[int, list[tuple[float, float]]] = {}
    for turn, x, y in known:
        if x in used:
            turns.setdefault(turn, []).append((math.log(x), math.log(y)))
    free = sum(map(len, turns.values())) - len(turns) - 1
    if len(used) < 2 or free < 1:
        return Growth(note=TOO_FEW if known else "")
    span = (used[0], used[-1])
    slope, half = _line([pair for own in turns.values() for pair in _centred(own)], free)
    if slope < -1e-9 or 2 * half > WIDEST:
        return Growth(span=span, note=TOO_NOISY)
    return Growth(slope, (slope - half, slope + half), span)


def _centred(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    x, y = mean(x for x, _ in pairs), mean(y for _, y in pairs)
    return [(a - x, b - y) for a, b in pairs]


def _line(pairs: list[tuple[float, float]], free: int) -> tuple[float, float]:
    """The slope through the origin, and half of its 95% interval."""
    spread = sum(x * x for x, _ in pairs)
    slope = sum(x * y for x, y in pairs) / spread
    rest = sum((y - slope * x) ** 2 for x, y in pairs)
    return slope, _T95[min(free, len(_T95)) - 1] * math.sqrt(rest / free / spread)


def overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]
