"""Mechanisms by name: those of manyheads, and those of other packages (entry point group `manyheads.mechanisms`)."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from manyheads.card import Family, Pattern
from manyheads.mechanism import Mechanism
from manyheads.near import member, suggest

M = TypeVar("M", bound=type[Mechanism])
_registered: dict[str, type[Mechanism]] = {}


def register(cls: M) -> M:
    """Class decorator at the foot of the taxonomy: makes `cls` known under `cls.card.name`."""
    other = _registered.get(cls.card.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"two mechanisms are named {cls.card.name!r}: {other.__module__}.{other.__qualname__} and "
            f"{cls.__module__}.{cls.__qualname__}; rename one of the cards"
        )
    _registered[cls.card.name] = cls
    return cls


@cache
def _load_all() -> None:
    import manyheads.mechanisms as package

    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for entry in entry_points(group="manyheads.mechanisms"):
        try:
            _load(entry)
        except Exception as error:  # of another package: what is asked for may well be ours
            whose = f"package {entry.dist.name!r}" if entry.dist else "another package"
            why = f"{type(error).__name__}: {error}"
            warnings.warn(f"{entry.value}, a mechanism of {whose}, is left out: {why}", stacklevel=3)


def _load(entry: EntryPoint) -> None:
    cls = entry.load()
    if not isinstance(cls, type) or not issubclass(cls, Mechanism):
        raise ValueError(f"its entry point {entry.name!r} names a {type(cls).__name__}; want a class of Mechanism")
    register(cls)


def mechanism_class(name: str) -> type[Mechanism]:
    """The class registered under `name`. Raises ValueError with near names for an unknown one."""
    _load_all()
    if not isinstance(name, str):
        raise ValueError(f"the name of a mechanism is {name!r}; want one of those that list_attentions() gives")
    if name not in _registered:
        raise ValueError(
            f"unknown mechanism {name!r}{suggest(name, _registered)} (`manyheads list` names all {len(_registered)})"
        )
    return _registered[name]


def list_attentions(*, family: str | None = None, pattern: str | None = None) -> list[str]:
    """Names of all mechanisms, sorted; only those of one family or with one declared pattern where asked."""
    _load_all()
    want_family = None if family is None else member(Family, family)
    want_pattern = None if pattern is None else member(Pattern, pattern)
    return sorted(
        name
        for name, cls in _registered.items()
        if want_family in (None, cls.card.family) and (want_pattern is None or want_pattern in cls.card.patterns)
    )


def create_attention(name: str, dim: int, heads: int, **config: Any) -> Mechanism:
    """Builds the mechanism `name` for inputs [batch, n, dim]; `config` are that mechanism's own arguments."""
    cls = mechanism_class(name)
    known = [p for p in inspect.signature(cls).parameters if p not in ("dim", "heads")]
    for given in config:
        if given not in known:
            raise ValueError(f"{name} has no argument {given!r}{suggest(given, known)}; it takes {known}")
    return cls(dim, heads, **config)
