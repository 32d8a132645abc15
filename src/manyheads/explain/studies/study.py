"""What a study is: a published claim about training dynamics, made small enough to be run and looked at.

A study is a frozen dataclass: its fields are its settings. It names the points that it measures (a model, a width, a
learning rate), measures one point with one seed at a time, and says from the cells whether the claim was seen.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from manyheads.near import suggest

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

Point = Mapping[str, Any]
Cell = Mapping[str, Any]
# One seed's figures are an anecdote: a claim is decided over so many at least.
LEAST_SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    """seen: whether the claim was seen; None where too little was measured to say. numbers: what that rests on.
    lines: the same in words."""

    seen: bool | None
    numbers: dict[str, float] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


class Study(ABC):
    """title, claim and reference: of the paper. simplified: what differs from it here, and why. columns: the figures of
    a cell that a short table shows, key to title. seeds: how many are run unless asked otherwise."""

    name: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[str]
    reference: ClassVar[str]
    simplified: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    seeds: ClassVar[int] = LEAST_SEEDS

    def identity(self) -> dict[str, Any]:
        """What a cell depends on besides the settings and the study's own text, such as a model's weights."""
        return {}

    @abstractmethod
    def points(self) -> list[Point]:
        """What is compared; `label` says it in words, the other keys are columns."""

    @abstractmethod
    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        """Figures by name, all finite floats; `curve`, where there is one, holds a row per recorded step."""

    @abstractmethod
    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        """From the cells that are done, which may be fewer than planned."""

    @abstractmethod
    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        """The study's figures."""

    @property
    def config(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]


S = TypeVar("S", bound=type[Study])
_registered: dict[str, type[Study]] = {}


def register_study(cls: S) -> S:
    """Class decorator: makes a study known by its name."""
    _registered[cls.name] = cls
    return cls


def _load_all() -> None:
    import manyheads.explain.studies as package

    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def list_studies() -> list[str]:
    """Names of all studies, sorted."""
    _load_all()
    return sorted(_registered)


def study_class(name: str) -> type[Study]:
    _load_all()
    if name not in _registered:
        raise ValueError(f"unknown study {name!r}{suggest(name, _registered)}; there are {', '.join(list_studies())}")
    return _registered[name]


def create_study(name: str, **settings: Any) -> Study:
    """The study `name`; `settings` are its fields, all of them positive numbers or tuples of such."""
    cls = study_class(name)
    known = {own.name: own.default for own in fields(cls)}  # type: ignore[arg-type]
    for given, value in settings.items():
        if given not in known:
            raise ValueError(f"{name} has no setting {given!r}{suggest(given, known)}; it has {', '.join(known)}")
        _check(name, given, value, known[given])
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


def _check(study: str, name: str, value: Any, default: Any) -> None:
    many = isinstance(default, tuple)
    values = value if many and isinstance(value, tuple | list) else () if many else [value]
    kind = type(default[0] if many else default)
    right = values and all(
        isinstance(one, kind if kind is not float else (int, float)) and not isinstance(one, bool) for one in values
    )
    if not right or (kind is not str and min(values) <= 0):
        want = (
            f"{'some ' if many else 'a '}{'text' if kind is str else f'positive {kind.__name__}'}{'s' if many else ''}"
        )
        raise ValueError(f"{study}: {name}={value!r}; want {want}, as in the default {default!r}")


# -- what studies share ------------------------------------------------------------------------------------------------


@contextmanager
def seeded(*purpose: str | int) -> Iterator[None]:
    """torch's own generator, seeded for `purpose` while inside and as it was afterwards: initial weights."""
    from manyheads.tasks.draw import generator

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*purpose).initial_seed())
        yield


def average(cells: Iterable[Cell], key: str, **where: Any) -> float | None:
    """The mean of a figure over the cells whose columns are as given; None where there is none."""
    found = [float(cell[key]) for cell in cells if all(cell.get(k) == v for k, v in where.items()) and key in cell]
    return mean(found) if found else None


def decided(study: Study, cells: Sequence[Cell]) -> Verdict:
    """The study's verdict, open where too few seeds were measured to say that the claim was seen or was not."""
    if not cells:
        return Verdict(None, lines=("Nothing was measured.",))
    found, seeds = study.verdict(cells), {cell["seed"] for cell in cells}
    if found.seen is None or len(seeds) >= LEAST_SEEDS:
        return found
    line = f"{len(seeds)} of the {LEAST_SEEDS} seeds that a verdict takes: so far {'' if found.seen else 'not '}seen."
    return Verdict(None, found.numbers, (line, *found.lines))


def paired(cells: Iterable[Cell], key: str, more: Cell, less: Cell) -> list[tuple[float, float]]:
    """The figure under two conditions, seed by seed, of the seeds that have both."""
    found: dict[int, dict[str, float]] = {}
    for cell in cells:
        for name, where in (("more", more), ("less", less)):
            if key in cell and all(cell.get(column) == value for column, value in where.items()):
                found.setdefault(cell["seed"], {})[name] = float(cell[key])
    return [(own["more"], own["less"]) for _, own in sorted(found.items()) if len(own) == 2]


def always(pairs: Sequence[tuple[float, float]]) -> bool | None:
    """Whether the first is greater in every pair: no line to tune, and no seed that tells otherwise. None: no pair."""
    return all(more > less for more, less in pairs) if pairs else None


def both_ways(parts: Sequence[bool | None]) -> bool | None:
    """All parts of a claim; None where one was not measured."""
    return None if not parts or None in parts else all(parts)


def said(what: str, pairs: Sequence[tuple[float, float]], form: str = ".3g") -> str:
    """A line of a verdict: the pairs of all seeds and how many agree."""
    told = ", ".join(f"{more:{form}} against {less:{form}}" for more, less in pairs) or "not measured"
    return f"{what}: {told} (true of {sum(more > less for more, less in pairs)} of {len(pairs)})."


def checkpoints(steps: int, count: int = 40) -> set[int]:
    """Steps at which a curve is recorded: dense at first, the last one always."""
    spread = {round(steps * (i / count) ** 2) for i in range(count + 1)}
    return spread | {0, steps}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def source_of(study: Study) -> str:
    """The text that a study's figures come from: who edits it gets new figures, not the stored ones."""
    from manyheads.explain.studies import tiny

    return "".join(inspect.getsource(module) for module in (inspect.getmodule(type(study)), tiny) if module)
