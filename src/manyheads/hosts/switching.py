"""A model that attends through a function of ours for a while."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from manyheads.mechanism import Mechanism


@contextmanager
def uncompiled() -> Iterator[None]:
    """While open, compiled code runs as it was written: it was made for another attention, and does not look."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and loading it takes longer than most taps
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


# Per model: the function that it attends through, and how many asked for it.
_switches: weakref.WeakKeyDictionary[nn.Module, tuple[str, int]] = weakref.WeakKeyDictionary()


@contextmanager
def switched(model: Any, name: str, name_of: Callable[[Any], str] | None = None) -> Iterator[None]:
    """While open, the model attends through the function that transformers knows by this name; name_of: through that
    of another name in some of its parts. Configs are copied first: several models may share one. ValueError where it
    attends through another of ours already."""
    before, count = _switches.get(model, (name, 0))
    if before != name:
        raise ValueError(f"{type(model).__name__} attends through {before} just now: leave that first")
    if count:
        _switches[model] = name, count + 1
        try:
            yield
        finally:
            _switches[model] = name, _switches[model][1] - 1
        return
    kept, memo = [], {}  # type: ignore[var-annotated]
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, "_attn_implementation", None) == "manyheads_ragged":
            raise ValueError(
                f"{type(model).__name__} attends through a shrunk cache: tap it outside the policy, after release()"
            )
        if config is not None and not isinstance(module, Mechanism):
            kept.append((module, config))
            module.config = copy.deepcopy(config, memo)
    _switches[model] = name, 1
    try:
        for module in model.modules():
            if hasattr(module, "set_attn_implementation") and module._can_set_attn_implementation():
                module.set_attn_implementation(name if name_of is None else name_of(module))
        yield
    finally:
        _switches.pop(model, None)
        for module, config in kept:
            module.config = config
