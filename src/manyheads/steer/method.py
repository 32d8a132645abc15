"""What `manyheads steer` knows of an intervention: its name, its arguments, which models it takes, and where it is
neutral. The intervention itself is a context manager in the file of its paper; the function declared here opens it for
a model and a prompt."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import manyheads.steer
from manyheads.near import suggest

# What a model is, as far as an intervention asks: it reads text; text and images; pairs of both (CLIP); or it draws.
KINDS = ("language", "vision-language", "dual-encoder", "diffusion")
# Whose attention it changes: of the tower that reads text, of the one that reads pictures; of a model that draws, its
# self attention over patches, or its cross attention to words. "inputs" and "logits": of nobody, but what goes in or
# comes out.
TOWERS = ("text", "image", "patches", "words", "inputs", "logits")
# The argument that names the caption of a reference picture: an intervention that has it takes one.
REFERENCE = "source"
# Arguments that name a file.
FILES = ("file", "gates", "interpreters")


@dataclass(frozen=True)
class Prompt:
    """What the model is fed, by the names of its forward, and the places that interventions are about.

    inputs: tensors. spans: name -> places in the sequence as the model sees it; "image" where image tokens stand,
    "text" for all words that the user marked, "text1", "text2" for each mark. tokenizer: where there is one.
    """

    inputs: Mapping[str, Any]
    spans: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tokenizer: Any = None

    def marked(self) -> list[list[int]]:
        """The places of every mark, in the order of the marks."""
        names = [name for name in self.spans if name.startswith("text") and name[4:].isdigit()]
        return [self.places(name) for name in sorted(names, key=lambda name: int(name[4:]))]

    def places(self, span: str) -> list[int]:
        if span not in self.spans:
            how = " (mark some of its words: --span WORDS)" if span.startswith("text") else ""
            raise ValueError(f"the prompt has no span {span!r}; it has {sorted(self.spans) or 'none'}{how}")
        return [int(place) for place in self.spans[span]]


@dataclass(frozen=True)
class Method:
    """open(model, prompt, **arguments) -> a context manager; arguments are those after the first two, keyword only,
    with JSON defaults. neutral: arguments at which the model is exactly as it was. strength: the argument that
    `--sweep` goes over, None where no one argument is; reach: between which values a slider of it goes. towers: whose
    attention it changes. For diffusion models the prompt is a `steer.diffusion.drawing.Drawing`, and the context
    manager gives the `Rows` that are drawn together."""

    name: str
    title: str
    source: str
    kinds: tuple[str, ...]
    neutral: Mapping[str, Any]
    strength: str | None
    open: Callable[..., AbstractContextManager[Any]]
    reach: tuple[float, float] | None = None
    towers: tuple[str, ...] = ("text",)

    @property
    def takes_picture(self) -> bool:
        """Whether a drawing can be given a reference picture."""
        return REFERENCE in self.arguments

    def check_changed(self, arguments: Mapping[str, Any], changed: bool) -> None:
        """ValueError where it was not set to its neutral point, and nothing at all is other than without it."""
        given = {**self.arguments, **arguments}
        if not changed and any(given[name] != value for name, value in self.neutral.items()):
            own = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(
                f"{self.name} changes nothing at all here ({own}): it found nothing to change, or does not reach far "
                "enough; give other arguments"
            )

    @property
    def files(self) -> list[str]:
        """Arguments that name files, which a form on the network may not."""
        return [name for name in self.arguments if name in FILES]

    @property
    def needs(self) -> list[str]:
        return [name for name, default in self.arguments.items() if default is inspect.Parameter.empty]

    @property
    def arguments(self) -> dict[str, Any]:
        """Name -> default; `inspect.Parameter.empty` where one must be given."""
        return {p.name: p.default for p in inspect.signature(self.open).parameters.values() if p.kind == p.KEYWORD_ONLY}


_METHODS: dict[str, Method] = {}


def steering(
    name: str,
    *,
    title: str,
    source: str,
    kinds: Sequence[str],
    neutral: Mapping[str, Any],
    strength: str | None,
    reach: tuple[float, float] | None = None,
    towers: Sequence[str] = ("text",),
) -> Callable[[Callable[..., AbstractContextManager[Any]]], Callable[..., AbstractContextManager[Any]]]:
    """Decorator of a function open(model, prompt, *, ...): makes the intervention known to the command by its name."""

    def declare(function: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
        method = Method(name, title, source, tuple(kinds), dict(neutral), strength, function, reach, tuple(towers))
        unknown = [kind for kind in method.kinds if kind not in KINDS]
        unknown += [tower for tower in method.towers if tower not in TOWERS]
        missing = [key for key in (*method.neutral, *([strength] if strength else [])) if key not in method.arguments]
        if unknown or missing or name in _METHODS:
            raise ValueError(
                f"steering {name!r}: unknown kinds or towers {unknown}, unknown arguments {missing}, or named twice"
            )
        _METHODS[name] = method
        return function

    return declare


def methods(kind: str | None = None) -> list[Method]:
    """All that are declared, or those that take a kind of model, by name."""
    for found in pkgutil.walk_packages(manyheads.steer.__path__, "manyheads.steer."):
        importlib.import_module(found.name)
    return sorted((m for m in _METHODS.values() if kind is None or kind in m.kinds), key=lambda m: m.name)


def method(name: str) -> Method:
    known = {found.name: found for found in methods()}
    if name not in known:
        raise ValueError(f"no intervention is called {name!r}{suggest(name, list(known))}")
    return known[name]
