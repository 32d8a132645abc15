"""`--with boost[factor=5,heads=3.1,4.2]`: the name of an intervention and its arguments, as they are typed."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, get_args, get_type_hints

from manyheads.near import suggest
from manyheads.runs.given import shown
from manyheads.steer.method import Method, method

_MOST = 10_000


class Declared(Protocol):
    """An intervention, or a form of training: its name, what it takes, and whose signature says of what type."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> dict[str, Any]: ...

    @property
    def open(self) -> Callable[..., Any]: ...


D = TypeVar("D", bound=Declared)


def parse(text: str) -> tuple[Method, dict[str, Any]]:
    """The intervention and its arguments in their own types."""
    return parse_as(text, method)


def parse_as(text: str, find: Callable[[str], D]) -> tuple[D, dict[str, Any]]:
    """What `find` finds by its name, and its arguments in their own types. A comma parts arguments only where `key=`
    follows, so that lists need no quotes; a head 3.10 stays a head, and is no number."""
    found = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[(.*)\])?\s*", text[:_MOST], re.DOTALL)
    if found is None or len(text) > _MOST:
        raise ValueError(f"{shown(text)!r} is no intervention; want NAME or NAME[key=value,key=value]")
    typed: dict[str, str] = {}
    for part in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", found[2]) if found[2] else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{shown(text)!r}: {shown(part)!r} is no argument; want NAME[key=value,key=value]")
        if key.strip() in typed:
            raise ValueError(f"{shown(text)!r}: {key.strip()!r} is there twice; give it once")
        typed[key.strip()] = value.strip()
    chosen = find(found[1])
    return chosen, arguments(chosen, typed)


def arguments(chosen: Declared, typed: Mapping[str, str]) -> dict[str, Any]:
    """What was typed, read as the types that the intervention's own signature says."""
    known, hints = chosen.arguments, get_type_hints(chosen.open)
    for key in typed:
        if key not in known:
            own = ", ".join(known) or "none"
            raise ValueError(f"{chosen.name} has no argument {shown(key)!r}{suggest(key, list(known))} (it has {own})")
    read = {key: _read(hints[key], value, f"{chosen.name}: {key}") for key, value in typed.items()}
    missing = [key for key, default in known.items() if default is inspect.Parameter.empty and key not in read]
    if missing:
        raise ValueError(f"{chosen.name} needs {', '.join(missing)}: type {chosen.name}[{missing[0]}=...]")
    return read


def _read(hint: Any, text: str, what: str) -> Any:
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind in _READERS]
    assert kinds, f"{what} has a type that cannot be typed: {hint}"
    return _READERS[kinds[0]](text, what)


def number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{what}={shown(text)}: want a number")
    return value


def _whole(text: str, what: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
        raise ValueError(f"{what}={shown(text)}: want a whole number")
    return int(text)


def _yes(text: str, what: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no"):
        raise ValueError(f"{what}={shown(text)}: want yes or no")
    return text.lower() in ("true", "yes")


def _words(text: str, what: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


_READERS: dict[Any, Callable[[str, str], Any]] = {float: number, int: _whole, bool: _yes, str: _words}


def parse_sweep(chosen: Method, text: str) -> tuple[str, list[Any]]:
    """'factor=0.5,1,2' or '0.5,1,2' of the intervention's own strength: its name and the values in their own type."""
    key, equals, values = text.rpartition("=")
    key = key.strip() if equals else chosen.strength or ""
    if not key:
        raise ValueError(f"{chosen.name} has no strength of its own to sweep over: type --sweep ARGUMENT=VALUE,VALUE")
    read = [arguments_of(chosen, key, part.strip()) for part in values.split(",") if part.strip()]
    if len(read) < 2:
        raise ValueError(f"--sweep {shown(text)!r}: want two values or more, such as --sweep {key}=0.5,1,2")
    return key, list(dict.fromkeys(read))


def arguments_of(chosen: Method, key: str, text: str) -> Any:
    if key not in chosen.arguments:
        own = ", ".join(chosen.arguments) or "none"
        raise ValueError(f"{chosen.name} has no argument {shown(key)!r} to sweep over (it has {own})")
    return _read(get_type_hints(chosen.open)[key], text, f"--sweep {key}")
