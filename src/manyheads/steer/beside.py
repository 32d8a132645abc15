"""A model that runs several times per call, and answers with logits made of all runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from manyheads.cache_names import with_cache
from manyheads.hosts.switching import uncompiled
from manyheads.hosts.wrappers import inside
from manyheads.steer.companions import companions, named, own_cache

# The arguments of a call by name -> those of another run, and what is open while it runs.
Run = Callable[[dict[str, Any]], tuple[dict[str, Any], AbstractContextManager[Any]]]
# The model's own logits, and those of the other runs -> the logits that come back; float32 at least.
Combine = Callable[[Tensor, Sequence[Tensor]], Tensor]


@contextmanager
def beside(
    model: Any,
    runs: Sequence[Run],
    combine: Combine,
    who: str,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """While open every call of the model runs once more per run, with a cache of its own that is reordered, cropped and
    reset with the one that is given. around: what is open while the model's own run is on. ValueError for labels, whose
    loss would be of the first run alone, and for a cache that was filled outside."""
    model = inside(model)
    forward = model.forward
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def every_run(*args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        if kwargs.get("labels") is not None:
            raise ValueError(f"{who} mixes logits after the loss: leave labels out")
        if kwargs.get("mm_encoder_outputs") is not None:
            raise ValueError(f"{who}: give pixel_values; of encoded pictures the other runs cannot see theirs")
        past = own_cache(model, kwargs)
        others = [None] * len(runs) if past is None else companions(past, name, lambda: fresh(past, len(runs), who))
        logits = []
        for run, own in zip(runs, others, strict=True):
            changed, open_ = run(dict(kwargs))
            with open_:
                logits.append(forward(**with_cache(changed, own)).logits)
        with around():
            first = forward(**kwargs)
        kind = first.logits.dtype
        first.logits = combine(first.logits.float(), [each.float() for each in logits]).to(kind)
        return first

    with (
        uncompiled(),
        named(model, who) as name,
        _own(model, "forward", every_run),
        _own(model, "_supports_mm_encoder_outputs", lambda: False),
    ):
        yield


@contextmanager
def _own(model: Any, name: str, value: Any) -> Iterator[None]:
    """The model with an attribute of its own; generate of newer releases encodes pictures before it calls, and asks the
    second one whether it may."""
    before, had = model.__dict__.get(name), name in model.__dict__
    setattr(model, name, value)
    try:
        yield
    finally:
        if had:
            setattr(model, name, before)
        else:
            delattr(model, name)


def fresh(past: Any, count: int, who: str) -> list[Any]:
    """The other runs' caches, of a cache that holds nothing yet."""
    from transformers import DynamicCache

    if past.get_seq_length():
        raise ValueError(f"{who}: the cache was filled outside of this block; start the text inside")
    return [DynamicCache() for _ in range(count)]


def plausible(mixed: Tensor, own: Tensor, least: float) -> Tensor:
    """Logits with -inf wherever the model's own probability is below `least` of its greatest; 0: nowhere."""
    if least == 0:
        return mixed
    import math

    return mixed.masked_fill(own < own.amax(-1, keepdim=True) + math.log(least), -math.inf)
