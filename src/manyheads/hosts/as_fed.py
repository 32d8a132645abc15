"""Keys of a cache in their places: key j is the j-th token that was fed.

A window's cache gives a layer its latest keys alone, a static one its whole buffer, which later tokens are put into.
Who reads a call counts tokens from the first one fed, and may look at it when the cache has gone on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.sites import Site

# The layers that run just now in this thread, each with the cache that it was given.
_running = threading.local()


@contextmanager
def caches_noted(sites: Sequence[Site]) -> Iterator[None]:
    """While open, `as_fed` knows of the caches that these sites are given."""
    with ExitStack() as stack:
        for module in {id(site.module): site.module for site in sites}.values():
            stack.callback(module.register_forward_pre_hook(_begin, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_end, always_call=True).remove)
        yield


def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = (each for each in (*kwargs.values(), *args) if hasattr(each, "get_seq_length"))
    _now().append((module, next(given, None)))


def _end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    own = _now()
    if own and own[-1][0] is module:
        own.pop()


def _now() -> list[tuple[nn.Module, Any]]:
    if not hasattr(_running, "layers"):
        _running.layers = []
    found: list[tuple[nn.Module, Any]] = _running.layers
    return found


def as_fed(
    module: nn.Module, key: Tensor, value: Tensor, mask: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The call's keys, values and mask over all tokens fed, and no more; zeros, and hidden, where a window forgot."""
    own = _now()
    cache = own[-1][1] if own and own[-1][0] is module else None
    if cache is None:
        return key, value, mask
    part = "cross_attention_cache" if cross else "self_attention_cache"
    cache = getattr(cache, part, cache)
    place = getattr(module, "layer_idx", None)
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if place is None or not layers:
        return key, value, mask
    # A layer that reads another one's keys has none in the cache; those below it have seen this pass.
    layer = layers[place] if place < len(layers) else layers[0]
    if getattr(layer, "is_compileable", False):
        key, value = key.clone(), value.clone()
    if cross:
        return key, value, mask
    fed, m = int(cache.get_seq_length(place if place < len(layers) else 0)), key.shape[2]
    if getattr(layer, "is_sliding", False) and not (_windowed(layer) or fed == m):
        raise ValueError(
            f"{type(module).__name__} caches keys of its own beside those of tokens ({m} after {fed} tokens), which "
            "have no places in the text: a tap reads it in one pass over all of it, with use_cache=False"
        )
    if fed > m and any(_windowed(each) for each in ([layer] if place < len(layers) else layers)):
        return _behind(key, value, mask, fed - m)
    if fed < m == _buffer(layer):
        return key[:, :, :fed], value[:, :, :fed], None if mask is None else mask[..., :fed]
    return key, value, mask


def _windowed(layer: Any) -> bool:
    """Whether it holds the latest keys and nothing else: a family's own layers may add others."""
    return bool(getattr(layer, "is_sliding", False)) and type(layer).__module__ == "transformers.cache_utils"


def _buffer(layer: Any) -> int | None:
    """Places of a static layer's buffer."""
    static = getattr(layer, "is_compileable", False) and isinstance(getattr(layer, "keys", None), Tensor)
    return int(layer.keys.shape[2]) if static else None


def _behind(key: Tensor, value: Tensor, mask: Tensor | None, gone: int) -> tuple[Tensor, Tensor, Tensor]:
    """Behind so many tokens that nobody sees."""
    m = key.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, 1, m, dtype=torch.bool, device=key.device)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if mask.shape[-1] == m:
        mask = nn.functional.pad(mask, (gone, 0), value=hidden)
    key, value = (nn.functional.pad(rows, (0, 0, gone, 0)) for rows in (key, value))
    return key, value, mask
