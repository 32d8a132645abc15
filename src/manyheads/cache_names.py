"""The name under which transformers hands a cache on: `cache` from its release 5.24, `past_key_values` before.

Callers may say either, as transformers itself lets them; what is handed on to it has the name that it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

CACHE_NAMES = ("cache", "past_key_values")
# Not asked of transformers itself, which takes seconds to load, and constant for torch.compile.
CACHE_NAME = CACHE_NAMES[tuple(map(int, version("transformers").split(".")[:2])) < (5, 24)]


def given_cache(named: Mapping[str, Any]) -> Any:
    """The cache among the named arguments of a call; None without one."""
    return next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)


def with_cache(named: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The named arguments with this cache, in the place of what was given."""
    return {name: own for name, own in named.items() if name not in CACHE_NAMES} | {CACHE_NAME: cache}


def cache_of(output: Any) -> Any:
    """The cache that a model gives back; None where it gives none."""
    return getattr(output, CACHE_NAME, None)


def takes_cache(forward: F) -> F:
    """A forward with the argument past_key_values, which may be called `cache` as well."""

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            if "past_key_values" in kwargs:
                raise TypeError("cache and past_key_values are two names of one argument: give one of them")
            kwargs["past_key_values"] = kwargs.pop("cache")
        return forward(*args, **kwargs)

    return named  # type: ignore[return-value]
