"""Dropping once a whole context has passed, with all layers and heads in view: for KVzip and its fast form.

Legend: b batch, H KV heads, m tokens of the context.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Called with the model's body, the cache, and the arguments of the call that brought the context.
Compress = Callable[[Any, Any, dict[str, Any]], None]


def after_context(model: Any, cache: Any, compress: Compress) -> None:
    """Calls compress after the first pass of several tokens into the cache, for as long as there is the cache."""
    own = weakref.ref(cache)

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        held = kwargs.get("past_key_values")
        if held is not own():
            return
        if held is None or held.shared.get("repeating"):
            return
        if held.layers[0].store.groups[0].length == held.get_seq_length() == _fed(kwargs).shape[1] > 1:
            compress(module, held, kwargs)

    hook = model.base_model.register_forward_hook(after, with_kwargs=True)
    weakref.finalize(cache, hook.remove)


def _fed(kwargs: dict[str, Any]) -> Tensor:
    given = kwargs.get("input_ids")
    found: Tensor = kwargs["inputs_embeds"] if given is None else given
    return found


def real_tokens(name: str, kwargs: dict[str, Any]) -> Tensor:
    """[b, m] of a call's tokens."""
    padding, fed = kwargs.get("attention_mask"), _fed(kwargs)
    if not isinstance(padding, Tensor):
        return torch.ones(fed.shape[:2], dtype=torch.bool, device=fed.device)
    if padding.dim() != 2:
        raise ValueError(f"{name} compares whole rows of text; give a 2-D attention_mask [batch, tokens]")
    return padding.bool()


def budget(policy: Any, layer: Any, alive: Tensor) -> Tensor:
    """[b]: entries per head, on average."""
    count = alive.sum(1)
    if policy.compression_ratio is not None:
        found = (count.double() * (1 - policy.compression_ratio) + 1e-9).floor().long()
    else:
        found = torch.full_like(count, int(policy.fixed_target(layer)))
    return found.clamp_min(policy.smallest)


def drop_together(policy: Any, cache: Any, scores: list[Tensor], alive: Tensor) -> None:
    """The best scores [b, H, m] of all layers stay, or of each where the policy says per_layer; its sinks always."""
    first = alive & (alive.long().cumsum(1) <= policy.sink_size)
    ranked = [own.masked_fill(first[:, None], torch.inf).masked_fill(~alive[:, None], -torch.inf) for own in scores]
    counts = [budget(policy, layer, alive) * own.shape[1] for layer, own in zip(cache.layers, ranked, strict=True)]
    if policy.per_layer:
        keeps = [_best(own.flatten(1), each).view_as(own) for own, each in zip(ranked, counts, strict=True)]
    else:
        together = _best(torch.cat([own.flatten(1) for own in ranked], 1), torch.stack(counts).sum(0))
        parts = together.split([own.shape[1] * own.shape[2] for own in ranked], 1)
        keeps = [part.view_as(own) for part, own in zip(parts, ranked, strict=True)]
    for layer, keep in zip(cache.layers, keeps, strict=True):
        keep = keep & alive[:, None]
        if not bool(keep.all()):
            layer.store.evict([keep], layer.spare, layer.slack)


def _best(scores: Tensor, count: Tensor) -> Tensor:
    """[b, x] True at the count [b] highest scores of each row."""
    ranks = scores.argsort(-1, descending=True).argsort(-1)
    return ranks < count[:, None]
