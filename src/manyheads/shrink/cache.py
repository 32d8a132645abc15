"""The ragged cache: transformers' cache interface over one ragged store per layer.

`update` gives back a handle in the place of keys and values; the attention function registered in hosts/attention.py
hands it the queries, and the layer attends group by group and then lets the policy drop what is over budget. With
nothing dropped it is simply a cache that does not copy itself for every token.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from manyheads.hosts.attention import is_attached
from manyheads.hosts.families import layer_plans
from manyheads.hosts.wrappers import is_compiled
from manyheads.shrink.layer import RaggedLayer, untraced_layer
from manyheads.shrink.moving import find_turns
from manyheads.shrink.trial import starts_again

if TYPE_CHECKING:
    from manyheads.shrink.rules import Rules


class RaggedCache(Cache):
    """One RaggedLayer per layer of the model. Made by `policy.make_cache(model)`."""

    def __init__(self, model: nn.Module, policy: Rules):
        self.policy = policy
        self._model = weakref.ref(model)
        plans = layer_plans(model)
        self.depth = len(plans)
        self.shared: dict[str, Any] = {}
        self._closed = self.assists = False
        # Tokens at the end of a pass that may be taken back, where its call tells.
        self.guesses: int | None = None
        # What was fed [b, n], and which of it is never dropped, where the policy protects tokens.
        self.ids: Tensor | None = None
        self.protected: Tensor | None = None
        # What our own models keep beside it.
        self._lent: Any = None
        # A pass that begins before this slot is of the context.
        self.context = 1
        made = untraced_layer() if is_compiled(model) else RaggedLayer
        super().__init__(layers=[made(self, i, own.window) for i, own in enumerate(plans)])
        policy.check_layers(self.depth)
        policy.prepare(model, self)
        find_turns(policy, model, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedCache:
        """A cache that goes on by itself, for the same model and policy: neither is copied."""
        made = type(self).__new__(type(self))
        memo |= {id(self): made, **{id(own): own for own in (self.policy, *self.policy.parts)}}
        made.__dict__.update({name: copy.deepcopy(own, memo) for name, own in self.__dict__.items()})
        for layer in made.layers:
            layer.belongs_to(made)
        model = self._model()
        if model is not None:
            self.policy.prepare(model, made)
        return made

    def __getstate__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} belongs to a model in this process and is not pickled, nor copied by copy.copy: "
            "copy.deepcopy(cache) gives one that goes on by itself; for another process, feed it the text again"
        )

    def begin(
        self,
        model: Any,
        *,
        use_cache: bool | None,
        logits_to_keep: Any,
        position_ids: Tensor | None,
        input_ids: Tensor | None,
    ) -> None:
        """Before every call of the model that is given this cache. Nothing may follow one that caches nothing; and
        logits are kept of the last certain token and of what was guessed after it."""
        self._check_whole(model)
        if self._closed:
            raise ValueError(
                "this cache was fed by a call with use_cache=False, and is fed again: generate then feeds every token "
                "anew each time; set use_cache=True in the call, its generation_config or model.generation_config"
            )
        seen = self.get_seq_length()
        if seen and self.layers[0].record_past and starts_again(position_ids):
            raise ValueError(
                f"generate with guesses feeds the whole text again into a cache that holds {seen} tokens of it: "
                "transformers does not go on with a cache there; generate without guesses, or without past_key_values"
            )
        self._closed = use_cache is False
        if self.policy.protect is not None:
            self._protect(input_ids, seen)
        known = isinstance(logits_to_keep, int) and logits_to_keep > 0
        self.guesses = logits_to_keep - 1 + self.assists if known else None

    def _check_whole(self, model: Any) -> None:
        own = self._model()
        if own is not model:
            raise ValueError(
                f"this cache was made for another {type(model).__name__}, whose windows and weights its policy knows: "
                "give it to that model, or make one by policy.make_cache(model)"
            )
        # Guesses by a model's lower layers never come to the upper ones.
        seen = {layer.seen for layer in self.layers if layer.is_initialized}
        if len(seen) > 1 or any(layer.waiting is not None for layer in self.layers):
            told = " and others ".join(map(str, sorted(seen, reverse=True)))
            raise ValueError(
                f"a call with this cache broke off on its way through the layers: some have seen {told} tokens. Go on "
                "with a copy from before it (copy.deepcopy), or reset() the cache and feed it the text again"
            )

    def _protect(self, new: Tensor | None, seen: int) -> None:
        """Before a pass of ids [b, n]: which of all tokens fed are never dropped."""
        rule, name = self.policy.protect, type(self.policy).__name__
        assert rule is not None
        if new is None or (seen and (self.ids is None or self.ids.shape[1] < seen)):
            raise ValueError(
                f"{name}(protect=...) tells tokens by their ids, and these came without: give the model input_ids, in "
                "calls of its own, from the first pass on"
            )
        if self.ids is None or self.protected is None or not seen:
            self.ids, self.protected = new, rule.places(new)
            return
        ids = torch.cat([self.ids[:, :seen], new], 1)
        single = new.shape[1] == 1
        self.protected = torch.cat([self.protected[:, :seen], rule.single(new)], 1) if single else rule.places(ids)
        self.ids = ids

    def lend(self, stack: Any, batch: int) -> Any:
        """States for a pass of one of our own models, whose layers ask for them: see hosts/own_cache.py."""
        from manyheads.hosts.own_cache import LentStates

        if self._lent is None:
            self._lent = LentStates(self, stack)
        return self._lent.lend(batch)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._on_batch(lambda row: row.index_select(0, beam_idx.to(row.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._on_batch(lambda row: row.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._on_batch(lambda row: row[indices.to(row.device), ...])

    def _on_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.ids is not None and self.protected is not None:
            self.ids, self.protected = change(self.ids), change(self.protected)
        if self._lent is not None:
            self._lent.on_batch(change)

    def expect(self, tokens: int) -> None:
        """The next `tokens` tokens are one context, in however many passes they come; for an empty cache. Without this
        the first pass is. generate inside a policy's block says it for its chunks."""
        if self.get_seq_length():
            raise ValueError(
                f"expect({tokens}): the cache holds {self.get_seq_length()} tokens, so its context is there already; "
                "say it before the first pass, or after reset()"
            )
        self.context = tokens

    def assist(self) -> None:
        """For the cache of a model that guesses for another: the token before its guesses is taken back with them."""
        self.assists = True
        self.activate_past_recording()

    def reset(self) -> None:
        super().reset()
        self._closed, self.context = False, 1
        self.ids = self.protected = self._lent = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held, room for coming tokens included."""
        memos = [own for layer in self.layers for own in layer.memo.values()]
        trials = [layer.trial.nbytes for layer in self.layers if layer.trial is not None]
        told = [own.nbytes for own in (self.ids, self.protected) if own is not None]
        held = [layer.store.nbytes for layer in self.layers] + [own.nbytes for own in memos]
        heard = [done.queries.nbytes for layer in self.layers for done in layer.heard]
        return sum(held) + sum(trials) + sum(told) + sum(heard)

    def lengths(self) -> list[list[int]]:
        """Entries held, by layer and KV head."""
        return [layer.store.lengths() for layer in self.layers]

    def entries_read(self) -> list[list[int]]:
        """Entries that a query of the latest pass read at most, by layer and KV head: all, or the policy's part."""
        return [
            [length if layer.read is None else min(layer.read, length) for length in layer.store.lengths()]
            for layer in self.layers
        ]

    def check_attached(self) -> None:
        model = self._model()
        if model is not None and not is_attached(model):
            raise ValueError(
                f"{type(model).__name__} no longer attends through ragged caches (its `with` block has ended): "
                "use the cache inside the block, or make it with policy.make_cache(model)"
            )
