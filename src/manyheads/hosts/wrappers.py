"""What people put around a model, PEFT's adapters and torch.compile, and the model inside."""

from __future__ import annotations

import weakref
from typing import Any

# Models that were given with torch.compile around them, which they know nothing of.
_compiled: weakref.WeakSet[Any] = weakref.WeakSet()


def inside(model: Any) -> Any:
    """The transformers model inside; calls of what is around it arrive there, in its own call and generate."""
    compiled = False
    while True:
        compiled = compiled or hasattr(model, "_orig_mod")
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            _check_adapters(model)
            inner = model.get_base_model()
        if inner is None or inner is model:
            if compiled:
                _compiled.add(model)
            return model
        model = inner


def _check_adapters(model: Any) -> None:
    """Prefix tuning hands the model a cache that is filled already."""
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(
                f"{type(model).__name__}: adapter {name!r} ({kind}) gives every call a cache of learned keys and "
                "values, and a policy's cache cannot begin with those; shrink a model with LoRA, IA3 or prompt tuning, "
                "or leave the adapter out"
            )


def is_compiled(model: Any) -> bool:
    """Whether torch.compile is around the model or any of its parts."""
    return model in _compiled or any(
        "_orig_mod" in own._modules or getattr(own, "_compiled_call_impl", None) is not None for own in model.modules()
    )


def untraced(model: Any, hook: Any) -> Any:
    """The hook, hidden from torch.compile where that is around the model: what a cache does differs from token to
    token, and a graph of it would be compiled anew as often."""
    if not is_compiled(model):
        return hook
    import torch

    return torch.compiler.disable(hook)
