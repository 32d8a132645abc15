"""One check of every constructor's arguments, read off its annotations.

`int` takes integers, `dim` and `heads` from 1 on; `float` finite numbers; sequences hold such items; mappings have
names as keys. None passes where the annotation says so. What an annotation does not say (a least value, a name out of
a list) stays the mechanism's own to check.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def checked_arguments(name: str, init: Callable[..., None], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one call of a constructor (self left out), numbers of other libraries as Python's own.

    Raises ValueError, naming the mechanism and the argument, for a value that its annotation does not allow.
    """
    hints = _hints(init)
    checked = {}
    for key, value in arguments.items():
        try:
            checked[key] = _checked(value, hints.get(key, Any))
            if key in ("dim", "heads") and checked[key] < 1:
                raise _Unfit("an integer >= 1")
        except _Unfit as unfit:
            raise ValueError(f"{name}: {key}={_shown(value)}; want {unfit}") from None
    return checked


_WORD = 2**63
_LARGEST = 3.4028234663852886e38  # of float32: what is beyond is infinite in the module


class _Unfit(Exception):
    """Says what was wanted."""


@cache
def _hints(init: Callable[..., None]) -> dict[str, Any]:
    try:
        return get_type_hints(inspect.unwrap(init))
    except (NameError, TypeError):
        return {}  # an annotation that exists for type checkers only


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _checked(value: Any, allowed: Any) -> Any:
    origin = get_origin(allowed)
    if origin in (Union, types.UnionType):
        return _of_union(value, get_args(allowed))
    if origin is Literal:
        if value not in get_args(allowed):
            raise _Unfit(f"one of {list(get_args(allowed))}")
        return value
    if origin is Sequence:
        return _sequence(value, get_args(allowed)[0])
    if origin is Mapping or allowed is Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _Unfit("a mapping with names as keys")
        return value
    plain = _PLAIN.get(allowed)
    if plain is not None:
        return plain(value)
    if isinstance(allowed, type) and allowed is not Any and not isinstance(value, allowed):
        raise _Unfit(f"a {allowed.__name__}")
    return value


def _of_union(value: Any, choices: tuple[Any, ...]) -> Any:
    if value is None and type(None) in choices:
        return None
    wants = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _checked(value, choice)
        except _Unfit as unfit:
            wants.append(str(unfit))
    raise _Unfit(" or ".join([*wants, "None"] if type(None) in choices else wants))


def _sequence(value: Any, item: Any) -> Any:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise _Unfit("a list")
    try:
        items = [_checked(part, item) for part in value]
    except _Unfit as unfit:
        raise _Unfit(f"a list, each item {unfit}") from None
    return tuple(items) if isinstance(value, tuple) else items


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not -_WORD <= int(value) < _WORD:
        raise _Unfit("an integer")
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(float(value)) <= _LARGEST:
        raise _Unfit("a finite number")
    return value if isinstance(value, (int, float)) else float(value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Unfit("True or False")
    return value


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unfit("a name in quotes")
    return value


_PLAIN: dict[Any, Callable[[Any], Any]] = {int: _int, float: _float, bool: _bool, str: _str}
