"""Names that a reader may have meant; imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum
from typing import TypeVar

E = TypeVar("E", bound=StrEnum)


def suggest(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'moba' or 'moh'?`, or nothing where no name is near."""
    near = difflib.get_close_matches(given, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def member(enum: type[E], value: str) -> E:
    """The member of that value; ValueError with near ones for an unknown one."""
    try:
        return enum(value)
    except ValueError:
        names = [member.value for member in enum]
        raise ValueError(
            f"unknown {enum.__name__.lower()} {value!r}{suggest(value, names)}; want one of {names}"
        ) from None
