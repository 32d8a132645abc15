"""What a wrapper is given to wrap."""

from __future__ import annotations

from typing import Any

from manyheads.mechanism import Mechanism


def check_mechanism_given(who: str, given: Any) -> None:
    """ValueError for what is no mechanism: another wrapper, attention of another library, a name."""
    if not isinstance(given, Mechanism):
        shown = repr(given) if isinstance(given, str) else type(given).__name__
        raise ValueError(
            f"{who}: {shown} was given; want a mechanism as create_attention makes it: of several wrappers this one "
            "goes innermost"
        )


def innermost(given: Any) -> Any:
    """The mechanism inside of wrappers around it."""
    while not isinstance(given, Mechanism) and hasattr(given, "mechanism"):
        given = given.mechanism
    return given
