"""A model that attends through a function of ours for a while."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from manyheads.hosts.configs import LentConfigs
from manyheads.mechanism import Mechanism


@dataclass
class _Eager:
    """How many want what is compiled to run as it was written, and what the first of them changed."""

    count: int = 0
    changed: Any = None


_eager, _changing = _Eager(), threading.Lock()


@contextmanager
def uncompiled() -> Iterator[None]:
    """While open, compiled code runs as it was written: it was made for another attention, and does not look. Of
    several askers any may leave first."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and loading it takes longer than most taps
        yield
        return
    with _changing:
        if not _eager.count:
            _eager.changed = torch.compiler.set_stance("force_eager")
        _eager.count += 1
    try:
        yield
    finally:
        with _changing:
            _eager.count -= 1
            if not _eager.count:
                _eager.changed.__exit__(None, None, None)


@dataclass
class _Switch:
    """With what the module's config was lent, the function that it attends through, and how many asked for it."""

    lent: LentConfigs
    name: str
    count: int = 0


_switches: weakref.WeakKeyDictionary[nn.Module, _Switch] = weakref.WeakKeyDictionary()


@contextmanager
def switched(model: Any, name: str, name_of: Callable[[Any], str] | None = None) -> Iterator[None]:
    """While open, the model attends through the function that transformers knows by this name; name_of: through that
    of another name in some of its parts. Configs are copied first: several models may share one. Of a model and a part
    of it, and of several askers, any may leave first. ValueError where it attends through another of ours already."""
    own = [module for module in model.modules() if _configured(module)]
    for module in own:
        if getattr(module.config, "_attn_implementation", None) == "manyheads_ragged":
            raise ValueError(
                f"{type(model).__name__} attends through a shrunk cache: tap it outside the policy, after release()"
            )
        before = _switches.get(module)
        if before is not None and before.name != name:
            raise ValueError(f"{type(model).__name__} attends through {before.name} just now: leave that first")
    fresh = [module for module in own if module not in _switches]
    lent = LentConfigs(fresh)
    _switches.update({module: _Switch(lent, name) for module in fresh})
    for module in own:
        _switches[module].count += 1
    try:
        for module in fresh:
            if hasattr(module, "set_attn_implementation") and module._can_set_attn_implementation():
                module.set_attn_implementation(name if name_of is None else name_of(module))
        lent.note()
        yield
    finally:
        for module in own:
            _leave(module)


def _configured(module: nn.Module) -> bool:
    return module.__dict__.get("config") is not None and not isinstance(module, Mechanism)


def _leave(module: Any) -> None:
    own = _switches[module]
    own.count -= 1
    if not own.count:
        del _switches[module]
        own.lent.give_back(module)
