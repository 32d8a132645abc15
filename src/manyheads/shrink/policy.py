"""A policy: which entries each KV head keeps, how many, and when. One method per policy file: `score`.

with SnapKV(budget_tokens=1024)(model):
    model.generate(...)

cache = StreamingLLM(budget_tokens=256).make_cache(model)
model.generate(..., past_key_values=cache)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from manyheads.hosts.attention import attach, detach, is_attached
from manyheads.hosts.generation import check_supported, intercepted
from manyheads.hosts.wrappers import inside
from manyheads.shrink.rules import Rules

if TYPE_CHECKING:
    from manyheads.shrink.cache import RaggedCache


# Models inside a policy's block, and its name.
_active: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


class Active:
    """What `with policy(model) as active` gives: active.cache is the latest cache that a call was given."""

    def __init__(self) -> None:
        self.cache: RaggedCache | None = None


@dataclass(kw_only=True)
class Policy(Rules):
    __doc__ = Rules.__doc__

    def make_cache(self, model: nn.Module) -> RaggedCache:
        """A cache for model.generate(past_key_values=...) or model(...). The model then attends through ragged layers
        whenever it is given one, and as before otherwise; `release(model)` undoes that. A PeftModel and a compiled
        model are taken as the model inside, which their calls arrive at."""
        from manyheads.shrink.cache import RaggedCache

        model = inside(model)
        self.check(model)
        attach(model)
        return RaggedCache(model, self)

    def check(self, model: nn.Module) -> None:
        """A ValueError with the reason, if the model's cache cannot be shrunk this way."""
        from manyheads.shrink.cache import RaggedCache

        check_supported(inside(model), lambda own: RaggedCache(own, Policy()))

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Active]:
        """Every call of the model inside gets a cache of this policy; afterwards the model is as it was."""
        from manyheads.shrink.cache import RaggedCache

        model = inside(model)
        self.check(model)
        self._check_alone(model)
        active, before = Active(), is_attached(model)

        def ours(given: Any) -> RaggedCache:
            if given is not None and not isinstance(given, RaggedCache):
                raise ValueError(
                    f"past_key_values is a {type(given).__name__}, which {type(self).__name__} cannot shrink; "
                    "leave it out, or give the cache of an earlier call"
                )
            # Named before it is told: another thread's call tells of its own meanwhile.
            cache = given if given is not None else RaggedCache(model, self)
            active.cache = cache
            return cache

        attach(model)
        _active[model] = type(self).__name__
        try:
            with intercepted(model, ours):
                yield active
        finally:
            del _active[model]
            if not before:
                detach(model)

    def _check_alone(self, model: nn.Module) -> None:
        outer, own = _active.get(model), type(self).__name__
        if outer is not None:
            raise ValueError(
                f"{own}: the model is inside a block of {outer} already, and a call has one cache; leave that block "
                f"first, or say what both do together: Composed({outer}(...), {own}(...))"
            )


def release(model: nn.Module) -> None:
    """Gives a model that make_cache changed its own attention back."""
    detach(inside(model))
