"""Boolean functions in context: points and their labels one after another, of a function that is drawn for each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from manyheads.tasks.draw import distinct, uniform
from manyheads.tasks.task import IGNORED, Batch, Generated, register_task, whole

LABEL = 2  # of a point, added to 0 or 1; bits themselves are tokens 0 and 1


class _Class(NamedTuple):
    """weights: draws [b, clauses, n], mostly literals: 1, -1 for a negated one, 0 for none.
    label: from points [b, p, n] of -1 and 1 and these, True where the label is 1. forced: share of the points in which
    one clause is made to hold (sign 1) or to fail with every literal (sign -1), so that both labels occur."""

    weights: Callable[[int, int, Generator], Tensor]
    label: Callable[[Tensor, Tensor], Tensor]
    forced: float = 0.0
    sign: int = 1


def _literals(clauses: int, each: float) -> Callable[[int, int, Generator], Tensor]:
    def draw(count: int, bits: int, rng: Generator) -> Tensor:
        chance = torch.rand(count, clauses, bits, generator=rng)
        return (chance < each).int() - (chance >= 1 - each).int()

    return draw


def _present(share: float) -> Callable[[int, int, Generator], Tensor]:
    return lambda count, bits, rng: (torch.rand(count, 1, bits, generator=rng) < share).int()


def _few(many: int) -> Callable[[int, int, Generator], Tensor]:
    def draw(count: int, bits: int, rng: Generator) -> Tensor:
        chosen = distinct(count, many, 0, bits, rng)
        return torch.zeros(count, bits, dtype=torch.int).scatter_(1, chosen, 1)[:, None]

    return draw


def _sums(points: Tensor, weights: Tensor) -> Tensor:
    """[b, clauses, p]."""
    return (weights.float() @ points.float().transpose(1, 2)).int()


def _size(weights: Tensor) -> Tensor:
    return weights.abs().sum(-1, keepdim=True)


def _some_and(points: Tensor, weights: Tensor) -> Tensor:
    return (_sums(points, weights) == _size(weights)).any(1)


def _all_or(points: Tensor, weights: Tensor) -> Tensor:
    return (_sums(points, weights) > -_size(weights)).all(1)


def _odd(points: Tensor, weights: Tensor) -> Tensor:
    return _sums((points + 1) // 2, weights)[:, 0] % 2 == 1


def _above_zero(points: Tensor, weights: Tensor) -> Tensor:
    return _sums(points, weights)[:, 0] > 0


def _with_threshold(count: int, bits: int, rng: Generator) -> Tensor:
    """Signed literals, and a threshold of -3 to 2 (that many and a half) in a column behind them."""
    return torch.cat([_literals(1, 0.15)(count, bits, rng), uniform(count, 1, -3, 3, rng).int()[:, None]], 2)


def _above_threshold(points: Tensor, weights: Tensor) -> Tensor:
    return _sums(points, weights[..., :-1])[:, 0] > weights[:, 0, -1:]


CLASSES = {
    "conjunction": _Class(_literals(1, 0.15), _some_and, 0.3),
    "disjunction": _Class(_literals(1, 0.15), _all_or, 0.3, -1),
    "sparse-disjunction": _Class(_few(4), _all_or, 0.3, -1),
    "dnf": _Class(_literals(3, 0.1), _some_and, 0.35),
    "cnf": _Class(_literals(3, 0.1), _all_or, 0.3, -1),
    "parity": _Class(_present(0.5), _odd),
    "sparse-parity": _Class(_few(2), _odd),
    "majority": _Class(_present(0.3), _above_zero),
    "halfspace": _Class(lambda count, bits, rng: uniform(count, bits, -3, 4, rng).int()[:, None], _above_zero),
    "sparse-threshold": _Class(_with_threshold, _above_threshold),
}
NEAREST = "nearest-neighbour"
TAUGHT = ("conjunction", "dnf")


@register_task
@dataclass(frozen=True, kw_only=True)
class Functions(Generated):
    """x1 y1 x2 y2 ...: name the label y of each point x of {-1, 1}^bits, for a function drawn anew for each row.

    kind is one of ten classes or "nearest-neighbour": the first `anchors` points have labels at random (equal points
    equal ones), each later one that of the most similar point before it (the earliest of several), and only later ones
    are asked for. Parity is 1 for an odd number of 1 in a random subset, a majority's tie is -1, a conjunction of
    nothing is 1 and a disjunction of nothing -1. In 30 to 35% of the points a clause is made to hold (or, in
    disjunctions, to fail), so that labels balance. teaching (conjunctions, and monotone disjunctive forms): first come
    the points that tell the function from all others of its class, in their order, then the random ones; 40% of those
    of a conjunction are positive then. The best constant answer is right in 0.5 to 0.75, but in 0.88 for dnf and cnf
    of 8 bits, where a clause is often empty: take the 28 bits of the paper for these.
    Source: arXiv:2310.03016, satwik77/incontext-bool `src/bool_tasks.py` (read at 8726c19): same classes and shares.
    Different: there a point is one vector at one position, here a token a bit, asked for at its last one; `anchors` is
    a setting without a default there; its monotone conjunction without teaching, which cannot run there, is left out.
    """

    name: ClassVar[str] = "functions"
    title: ClassVar[str] = "Boolean functions in context"
    pattern: ClassVar[str] = "causal-self"
    grows: ClassVar[str] = "points"

    kind: str = "conjunction"
    bits: int = 8
    points: int = 40
    teaching: bool = False
    anchors: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in (*CLASSES, NEAREST):
            raise ValueError(f"functions: kind={self.kind!r}; want one of {[*CLASSES, NEAREST]}")
        whole(self, "bits", self.bits, 4 if self.kind == "sparse-disjunction" else 2, 64)
        whole(self, "points", self.points, 2, 4096)
        whole(self, "anchors", self.anchors, 1, 4096)
        if self.kind == NEAREST and self.anchors >= self.points:
            raise ValueError(f"functions: anchors={self.anchors}; want fewer than points={self.points}, to ask some")
        if not isinstance(self.teaching, bool):
            raise ValueError(f"functions: teaching={self.teaching!r}; want true or false")
        if self.teaching and self.kind not in TAUGHT:
            raise ValueError(f"functions: teaching=true is for kind in {list(TAUGHT)}, not {self.kind!r}")
        needed = {"conjunction": self.bits + 2, "dnf": 3 * (self.bits + 1)}.get(self.kind, 0)
        if self.teaching and self.points <= needed:
            raise ValueError(
                f"functions: teaching takes up to {needed} points for bits={self.bits}; want points > {needed}"
            )

    @property
    def n(self) -> int:
        return self.points * (self.bits + 1) - 1

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": LABEL + 2, "max_length": self.n}

    def sample(self, count: int, rng: Generator) -> Batch:
        points = 2 * uniform(count, self.points * self.bits, 0, 2, rng).view(count, self.points, self.bits) - 1
        if self.kind == NEAREST:
            label = nearest(points, uniform(count, self.anchors, 0, 2, rng))
        else:
            label = self._labelled(points, rng)
        shown = LABEL + label.long()
        tokens = torch.cat([(points + 1) // 2, shown[..., None]], 2).flatten(1)[:, :-1].contiguous()
        targets = torch.full_like(tokens, IGNORED)
        targets[:, self.bits - 1 :: self.bits + 1] = shown
        if self.kind == NEAREST:
            targets[:, : self.anchors * (self.bits + 1)] = IGNORED
        return Batch({"input_ids": tokens}, targets)

    def _labelled(self, points: Tensor, rng: Generator) -> Tensor:
        """[b, p]; some of the points are changed in place, so that both labels occur."""
        count = len(points)
        kind = CLASSES[self.kind]
        weights = kind.weights(count, self.bits, rng)
        if self.teaching and self.kind == "dnf":
            weights = (torch.rand(count, 3, self.bits, generator=rng) < 0.2).int()
        share = 0.4 if self.teaching and self.kind == "conjunction" else kind.forced
        if share:
            which = uniform(count, 1, 0, weights.shape[1], rng)
            clause = weights[torch.arange(count)[:, None], which]
            forced = (torch.rand(count, self.points, 1, generator=rng) < share) & (clause != 0)
            points[:] = torch.where(forced, kind.sign * clause, points)
        if self.teaching:
            for row, clauses in enumerate(weights):
                conjunction = self.kind == "conjunction"
                lesson = taught(clauses) if conjunction else torch.cat([_broken(each) for each in clauses])
                points[row, : len(lesson)] = lesson
        return kind.label(points, weights)


def _broken(clause: Tensor) -> Tensor:
    """The clause [n] with all that is free at -1, then again with each of its literals wrong, positive ones first."""
    base = torch.where(clause == 0, -1, clause)
    order = [*(clause == 1).nonzero()[:, 0].tolist(), *(clause == -1).nonzero()[:, 0].tolist()]
    rows = base.repeat(1 + len(order), 1)
    for row, literal in enumerate(order, start=1):
        rows[row, literal] *= -1
    return rows


def taught(clauses: Tensor) -> Tensor:
    """The points that tell a conjunction [1, n] from all others: it holds whatever is free, and not without any of its
    literals."""
    rows = _broken(clauses[0])
    return torch.cat([rows[:1], torch.where(clauses == 0, 1, clauses), rows[1:]])


def nearest(points: Tensor, given: Tensor) -> Tensor:
    """Labels [b, p] of points [b, p, n]: those given [b, a] for the first ones, but equal for equal points."""
    count, many, bits = points.shape
    alike = points.float() @ points.float().transpose(1, 2)
    earliest_first = torch.arange(many, 0, -1) / (2 * many)
    label = torch.zeros(count, many, dtype=torch.long)
    label[:, 0] = given[:, 0]
    for at in range(1, many):
        best = (alike[:, at, :at] + earliest_first[:at]).argmax(1, keepdim=True)
        found = label.gather(1, best)[:, 0]
        if at < given.shape[1]:
            same = alike[:, at].gather(1, best)[:, 0] == bits
            found = torch.where(same, found, given[:, at])
        label[:, at] = found
    return label
