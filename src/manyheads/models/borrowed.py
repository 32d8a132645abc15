"""transformers' own cache of keys and values, read and filled where every layer holds nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from manyheads.mechanism import Mechanism
from manyheads.models.cache import ManyheadsCache
from manyheads.models.layers import Mixer
from manyheads.models.stack import Stack
from manyheads.softmax import SoftmaxAttention, changed_stages
from manyheads.state import State

# Stages that see the tokens of this pass only: what stands before it is keys and values, without positions or padding.
SEE_NO_PAST = {"project", "position", "normalise", "output"}


class BorrowedCache(ManyheadsCache):
    """States for one pass around the keys and values of a DynamicCache, which `after` adds the pass to: whoever
    holds it goes on with it, crops it, reorders it, as with transformers' models."""

    def __init__(self, owner: Cache, stack: Stack, x: Tensor) -> None:
        super().__init__(len(stack.layers))
        self.owner = owner
        for i, (block, layer) in enumerate(zip(stack.layers, self.layers, strict=True)):
            held = owner.layers[i] if i < len(owner.layers) else None
            if held is not None and held.get_seq_length():
                mechanism: Any = block.self_attn.mechanism  # type: ignore[union-attr]
                _check_shapes(f"layer {i}", mechanism, x, held)
                layer.self_attention.states["mechanism"] = _state(mechanism, held)

    def after(self, tokens: int) -> Cache:
        """The owner, with the tokens of this pass; where layers were checkpointed, none was kept."""
        whole = self.owner.get_seq_length() + tokens
        for i, layer in enumerate(self.layers):
            for state in (s for s in layer.self_attention.states.values() if s.length == whole):
                rows = [state.grown[name].view()[..., -tokens:, :] for name in ("keys", "values")]
                self.owner.update(rows[0], rows[1], i)
        return self.owner


def obstacle(past: Any, stack: Stack) -> str | None:
    """Why these layers cannot read and fill a cache that is not their own, None where they can."""
    if not isinstance(past, ManyheadsCache | DynamicCache):
        return "which is neither a ManyheadsCache nor a DynamicCache"
    if len(past.layers) not in (0, stack.memories):
        return f"the model has {stack.memories}"
    if stack.own:
        return f"the model remembers more than its layers do: {', '.join(stack.own)}"
    if any(type(layer) is not DynamicLayer for layer in past.layers):
        return "not all of them are kept whole"
    for i, block in enumerate(stack.layers):
        mixers: list[Any] = [block.self_attn, block.cross_attn]
        why = [_holds_more(mixer) for mixer in mixers if mixer is not None]
        if len(why) > 1 or why[0]:
            return f"layer {i} remembers {why[0] or 'an encoder'}"
    return None


def shape_of_rows(stack: Stack) -> dict[str, int]:
    """How many key/value heads of how many features stand in such a cache, by the names of transformers'
    configurations, which PEFT reads to make prefixes; nothing where layers differ, or hold something else."""
    if not stack.can_cache or obstacle(DynamicCache(), stack):
        return {}
    blocks: list[Any] = list(stack.layers)
    found = {(block.self_attn.mechanism.kv_heads, block.self_attn.mechanism.head_dim) for block in blocks}
    return dict(zip(("num_key_value_heads", "head_dim"), found.pop(), strict=True)) if len(found) == 1 else {}


def _holds_more(mixer: Mixer) -> str | None:
    """What a mixer has in its state besides keys and values as they are."""
    cls = type(mixer.mechanism)
    if mixer.convolution is not None:
        return "the inputs of a short convolution"
    if cls.card.takes:
        return f"what it is told of tokens beside them ({', '.join(cls.card.takes)})"
    bounded = getattr(mixer.mechanism, "span", None) is not None
    if not issubclass(cls, SoftmaxAttention) or not set(changed_stages(cls)) <= SEE_NO_PAST or bounded:
        return f"more, or other, than keys and values ({cls.card.name})"
    return None


def _state(mechanism: Mechanism, held: DynamicLayer) -> State:
    state = mechanism.init_state(held.keys.shape[0])
    usual = torch.arange(held.get_seq_length(), device=held.keys.device)[None]
    for name in ("padding", "positions"):  # kept by a state that has them; this one is asked for none
        state.append_optional(name, None, usual)
    state.append("keys", held.keys)
    state.append("values", held.values)
    state.advance(held.get_seq_length())
    return state


def _check_shapes(place: str, mechanism: Any, x: Tensor, held: DynamicLayer) -> None:
    none, nowhere = x[:, :0], torch.empty(1, 0, dtype=torch.long, device=x.device)
    q, k, v = mechanism.project(none, none)
    k = mechanism.position(q, k, nowhere, nowhere)[1]
    for name, found, wanted in (("keys", held.keys, k), ("values", held.values, v)):
        sizes = [list(t.shape[:2]) + list(t.shape[3:]) for t in (found, wanted)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"past_key_values: {place} has {name} of {tuple(found.shape)}; {mechanism.card.name} here has "
                f"[{sizes[1][0]} rows, {sizes[1][1]} heads, tokens, {sizes[1][2]}]"
            )


def refused(past: Any, stack: Stack, why: str) -> ValueError:
    return ValueError(
        f"past_key_values is {type(past).__name__} of {len(past)} layers ({why}); want a "
        f"ManyheadsCache({stack.memories}), or None for a new one"
    )
