"""What `manyheads steer personalise` knows of a form of training: its name, what of the model it trains, its arguments,
and where it is plain fine-tuning. The loss itself is in the file of its paper; the function declared here opens it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import manyheads.steer.personal
from manyheads.near import suggest

if TYPE_CHECKING:
    from torch import Tensor

    from manyheads.steer.personal.passes import Pass


class Lesson(Protocol):
    """What is learnt from pictures of a subject: captions(step, rows) says what the rows of a batch are told, the
    pictures' own captions unless the paper says others; a call gives the loss of one pass over them."""

    def captions(self, step: int, rows: Sequence[int]) -> list[str]: ...

    def __call__(self, step: int, own: Pass) -> Tensor: ...


@dataclass(frozen=True)
class Form:
    """open(model, album, **arguments) -> a lesson; arguments keyword only, with JSON defaults. trains: projections of
    cross attention that learn beside the subjects' words. prior: whether it learns to keep what the model drew before,
    from pictures that the model draws itself. rate: its learning rate. neutral: arguments at which it is plain
    fine-tuning, the paper's baseline: the same parameters by the velocity's error alone."""

    name: str
    title: str
    source: str
    trains: tuple[str, ...]
    prior: bool
    rate: float
    neutral: Mapping[str, Any]
    open: Callable[..., Lesson]

    @property
    def arguments(self) -> dict[str, Any]:
        """Name -> default."""
        return {p.name: p.default for p in inspect.signature(self.open).parameters.values() if p.kind == p.KEYWORD_ONLY}

    def plain(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.arguments, **arguments, **self.neutral}


_FORMS: dict[str, Form] = {}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def personalising(
    name: str,
    *,
    title: str,
    source: str,
    trains: Sequence[str],
    prior: bool,
    rate: float,
    neutral: Mapping[str, Any],
) -> Callable[[Callable[..., Lesson]], Callable[..., Lesson]]:
    """Decorator of a function open(model, album, *, ...): makes the form known to the command by its name."""

    def declare(function: Callable[..., Lesson]) -> Callable[..., Lesson]:
        form = Form(name, title, source, tuple(trains), prior, rate, dict(neutral), function)
        unknown = [own for own in form.trains if own not in PROJECTIONS]
        missing = [own for own in form.neutral if own not in form.arguments]
        if unknown or missing or name in _FORMS:
            raise ValueError(f"personalising {name!r}: trains {unknown}, unknown arguments {missing}, or named twice")
        _FORMS[name] = form
        return function

    return declare


def forms() -> list[Form]:
    """All that are declared, by name."""
    for found in pkgutil.iter_modules(manyheads.steer.personal.__path__, "manyheads.steer.personal."):
        importlib.import_module(found.name)
    return sorted(_FORMS.values(), key=lambda own: own.name)


def form(name: str) -> Form:
    known = {found.name: found for found in forms()}
    if name not in known:
        raise ValueError(f"no form of personalisation is called {name!r}{suggest(name, list(known))}")
    return known[name]
