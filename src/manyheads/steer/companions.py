"""The caches of a call's other runs, which belong to the one that the caller holds and go with it."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from manyheads.cache_names import CACHE_NAME, CACHE_NAMES, given_cache

# Per model, how many blocks of each name are open: two of one name have companions of their own.
_open: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()


@contextmanager
def named(model: Any, who: str) -> Iterator[str]:
    """While open, a name that no other block around this one has; a later block of the same kind has it again, and
    goes on with the companions of a cache that it is handed."""
    counts = _open.setdefault(model, Counter())
    counts[who] += 1
    try:
        yield f"{who} {counts[who]}"
    finally:
        counts[who] -= 1


def own_cache(model: Any, kwargs: dict[str, Any]) -> Any:
    """The cache of a call of the model. Where the model would make one itself, it is put into the arguments: it has
    to be there before the model fills it. None for a call without a cache."""
    past = given_cache(kwargs)
    if past is None and _caches(model, kwargs):
        past = kwargs[CACHE_NAME] = _fresh(model)
    return past


def _caches(model: Any, kwargs: dict[str, Any]) -> bool:
    if not inspect.signature(type(model).forward).parameters.keys() & set(CACHE_NAMES):
        return False
    wanted = kwargs.get("use_cache")
    wanted = getattr(model.config.get_text_config(decoder=True), "use_cache", None) if wanted is None else wanted
    return bool(wanted)


def _fresh(model: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    own = DynamicCache(config=model.config.get_text_config(decoder=True))
    return EncoderDecoderCache(own, DynamicCache()) if model.config.is_encoder_decoder else own


def alone(past: Any) -> Any:
    """A copy of the cache that has no companions yet."""
    held = vars(past).pop("manyheads_companions", None)
    try:
        made = copy.deepcopy(past)
    finally:
        if held is not None:
            past.manyheads_companions = held
    if isinstance(made, _Together):
        made.__class__ = type(made).__mro__[2]
    return made


def companions(past: Any, who: str, make: Callable[[], list[Any]]) -> list[Any]:
    """Made when the cache is first seen; from then on reordered, cropped and reset with it. ValueError where one of
    them was fed without the other."""
    held: dict[str, list[Any]] | None = vars(past).get("manyheads_companions")
    if held is None:
        past.__class__ = _together(type(past))
        held = past.manyheads_companions = {}
    if who not in held:
        held[who] = make()
    if any(int(own.get_seq_length()) != int(past.get_seq_length()) for own in held[who]):
        name = who.rpartition(" ")[0]
        raise ValueError(f"{name}: the cache was fed outside of this block; start the text inside")
    return held[who]


class _Together:
    """Of a cache whose companions do what it does. A class, so that a deep copy of the cache moves its own."""

    manyheads_companions: dict[str, list[Any]]


def _moving(name: str) -> Callable[..., Any]:
    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        for others in self.manyheads_companions.values():
            for own in others:
                getattr(own, name)(*args, **kwargs)
        return getattr(super(type(self), self), name)(*args, **kwargs)

    return move


_MOVES = {
    name: _moving(name)
    for name in ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
}


_made: dict[type, Any] = {}


def _together(cls: type) -> Any:
    if cls not in _made:
        _made[cls] = type(cls.__name__, (_Together, cls), {**_MOVES, "__module__": cls.__module__})
    return _made[cls]
