"""Keys of a cache in their places: key j is the j-th token that was fed.

A window's cache gives a layer its latest keys alone, a static one its whole buffer, which later tokens are put into.
Who reads a call counts tokens from the first one fed, and may look at it when the cache has gone on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.sites import Site

# The layers that run just now in this thread, each with the cache that it was given, and whether it is a cross one.
_running = threading.local()


@contextmanager
def caches_noted(sites: Sequence[Site]) -> Iterator[None]:
    """While open, `as_fed` knows of the caches that these sites are given."""
    with ExitStack() as stack:
        for site in {id(site.module): site for site in sites}.values():
            module = site.module
            begin = partial(_begin, site.kind == "cross")
            stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_end, always_call=True).remove)
        yield


def _begin(cross: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = next((each for each in (*kwargs.values(), *args) if hasattr(each, "get_seq_length")), None)
    part = "cross_attention_cache" if cross else "self_attention_cache"
    _now().append((module, getattr(given, part, given), cross))


def _end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    own = _now()
    if own and own[-1][0] is module:
        own.pop()


def _now() -> list[tuple[nn.Module, Any, bool]]:
    if not hasattr(_running, "layers"):
        _running.layers = []
    found: list[tuple[nn.Module, Any, bool]] = _running.layers
    return found


def as_fed(module: nn.Module, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The call's keys, values and mask over all tokens fed, and no more; zeros, and hidden, where a window forgot."""
    own = _now()
    running, cache, cross = own[-1] if own else (None, None, False)
    if cache is None or running is not module:
        return key, value, mask
    place = getattr(module, "layer_idx", None)
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if place is None or not layers:
        return key, value, mask
    layer = layers[place] if place < len(layers) else None
    # A layer that reads another one's keys has none in the cache; those below it have seen this pass.
    shares = not hasattr(layer, "get_seq_length")
    layer, place, any_of = (layers[0], 0, layers) if shares else (layer, place, [layer])
    if any(getattr(each, "is_compileable", False) for each in any_of):
        key, value = key.clone(), value.clone()
    if cross:
        return key, value, mask
    fed, m = int(cache.get_seq_length(place)), key.shape[2]
    if getattr(layer, "is_sliding", False) and not (_windowed(layer) or fed == m):
        raise ValueError(
            f"{type(module).__name__} caches keys of its own beside those of tokens ({m} after {fed} tokens), which "
            "have no places in the text: a tap reads it in one pass over all of it, with use_cache=False"
        )
    if fed > m and any(_windowed(each) for each in any_of):
        return _behind(key, value, mask, fed - m)
    if fed < m and any(_buffer(each) == m for each in any_of):
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
