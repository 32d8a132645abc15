"""The name under which transformers hands a cache on: `cache` from its release 5.24, `past_key_values` before.

Callers may say either, as transformers itself lets them; what is handed on to it has the name that it takes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

CACHE_NAMES = ("cache", "past_key_values")


@functools.cache
def cache_name() -> str:
    from transformers import GenerationMixin

    taken = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in taken)


def given_cache(named: Mapping[str, Any]) -> Any:
    """The cache among the named arguments of a call; None without one."""
    return next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)


def with_cache(named: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The named arguments with this cache, in the place of what was given."""
    return {name: own for name, own in named.items() if name not in CACHE_NAMES} | {cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The cache that a model gives back; None where it gives none."""
    return getattr(output, cache_name(), None)


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
