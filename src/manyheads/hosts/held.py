"""Keys by the places of their tokens, whatever a cache makes of them.

A static cache hands a layer its whole buffer, behind what was fed so far; one with a window hands it the latest tokens
alone. What reads a call counts keys by the places of the text: the buffer's end is cut off, and the keys that a window
let go stand there as zeros that no query sees.

Legend: b batch, g KV heads, n queries, m keys that the cache gave, t tokens fed so far, those of this pass included.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# The cache that a layer was called with last, while somebody reads it.
_given: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


# Layers that read less than the text just now: tokens have left below them.
_thin: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def mark_thin(module: nn.Module, thin: bool) -> None:
    (_thin.add if thin else _thin.discard)(module)


def check_whole(module: nn.Module, who: str) -> None:
    """ValueError where the places of a call's tokens are not those of the text."""
    if module in _thin:
        raise ValueError(
            f"{who} counts places of the text, and tokens have left below a layer that it reads: leave the block in "
            f"which tokens leave, or change the layers below it alone"
        )


class Keys(NamedTuple):
    """key, value [b, g, t, d], and the mask [b or 1, 1 or h, n, t] that goes with them, or None."""

    key: Tensor
    value: Tensor
    mask: Tensor | None


@contextmanager
def caches_noted(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While open, `fed` knows what was fed to these layers of self attention."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(_given.pop, module, None)
            stack.callback(module.register_forward_pre_hook(_note, with_kwargs=True).remove)
        yield


def _note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    from transformers.cache_utils import Cache

    cache = next((own for own in (*kwargs.values(), *args) if isinstance(own, Cache)), None)
    _given[module] = getattr(cache, "self_attention_cache", cache)


def fed(module: nn.Module) -> int | None:
    """t, while the layer attends; None without a cache of the library's own, whose keys are all that there are."""
    cache: Any = _given.get(module)
    if cache is None or not cache.layers:
        return None
    if any(not type(layer).__module__.startswith("transformers.") for layer in cache.layers):
        return None
    at = getattr(module, "layer_idx", None)
    own = cache.layers[at] if isinstance(at, int) and 0 <= at < len(cache.layers) else None
    # Layers that read the keys of another one hold none of their own.
    found = getattr(own, "get_seq_length", cache.get_seq_length)()
    return int(found)


def cut(keys: Keys, total: int | None) -> Keys:
    """Without the rest of a static buffer. Copies: the buffer is written over by later passes."""
    if total is None or keys.key.shape[2] <= total:
        return keys
    mask = keys.mask
    mask = mask if mask is None or mask.shape[-1] <= total else mask[..., :total]
    return Keys(keys.key[:, :, :total].clone(), keys.value[:, :, :total].clone(), mask)


def by_place(keys: Keys, total: int | None, queries: int) -> Keys:
    """All t keys, from those that the cache gave."""
    keys = cut(keys, total)
    gone = 0 if total is None else total - keys.key.shape[2]
    if not gone:
        return keys
    mask = keys.mask
    if mask is None:
        mask = torch.ones(1, 1, queries, keys.key.shape[2], dtype=torch.bool, device=keys.key.device)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    key, value = (pad(own, (0, 0, gone, 0)) for own in keys[:2])
    return Keys(key, value, pad(mask, (gone, 0), value=hidden))
