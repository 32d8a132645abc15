"""One layer of the ragged cache: a ragged store, and what its model and `generate` ask of a layer."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from manyheads.hosts.attend import Scoring, pack
from manyheads.hosts.visibility import Visibility
from manyheads.shrink.attending import attend_group, sinks_of
from manyheads.shrink.compress import Pass, make_room, shrink, trim
from manyheads.shrink.group import room_for, side_by_side
from manyheads.shrink.lasting import lasting, without_a_way_back
from manyheads.shrink.moving import move_up, moving_rows
from manyheads.shrink.store import Store
from manyheads.shrink.trial import Trial, in_parts, without_last


class RaggedLayer(CacheLayerMixin):
    """One layer's cache. `seen` counts the tokens fed, however few entries are left of them. What is held carries no
    gradient: those of a pass flow through its own keys where it is the first, never through earlier passes."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: Any, index: int, window: int | None):
        super().__init__()
        self.belongs_to(cache)
        self.policy = cache.policy
        self.index, self.layers = index, cache.depth
        self.window = window
        self.is_sliding = window is not None
        self.store = self._empty()
        self.seen = 0
        self.record_past = False
        # Passes whose last tokens may still be taken back: nothing is dropped for them before `crop`.
        self.recorded: list[Pass] = []
        # A pass between update and attend, where it is taken in parts; and the tokens that entries were dropped for.
        self.waiting: dict[str, Tensor] | None = None
        self.trial: Trial | None = None
        # What a policy keeps for the layer as a whole, rows of the batch first.
        self.memo: dict[str, Tensor] = {}
        self.angles: Tensor | None = None
        # By how much one position turns a key, where keys are moved up.
        self.turns: Tensor | None = None
        # Entries that a query of the latest pass read of each head, where a policy read a part.
        self.read: int | None = None
        # The latest queries, for policies that look back on more than those of a pass; replaced, never written to.
        self.heard: tuple[Pass, ...] = ()
        self._plan()
        # A policy's shares of the budget per head, fixed at prefill.
        self.shares: Tensor | None = None
        # Weights of a single query on each group, for as long as its pass lasts.
        self._made: list[Tensor | None] = []
        # The latest query's pass, for policies that make room before the next one.
        self.last: Pass | None = None

    def belongs_to(self, cache: Any) -> None:
        """Whose layer this is: what a call says of its tokens is said there."""
        self._cache = weakref.ref(cache)

    def _plan(self) -> None:
        """What the policy's parts ask for, found out once: a layer would pay for the question at every token."""
        self._parts = [own for own in self.policy.parts if not own.is_full]
        # Who is told of every pass, who makes room before one, and who is told different things in different layers.
        self.watching = tuple(own for own in self._parts if own.observes)
        self.making_room = tuple(own for own in self._parts if own.evicts_before)
        self.apart = any(own.apart for own in self.policy.parts)
        self._acting: dict[tuple[bool, bool], tuple[Any, ...]] = {}
        self._notes = (*self.policy.notes, *(("bias",) if self.policy.weighted else ()))
        asking = [own.looks_back for own in self._parts if own.acts(decoding=True)]
        self.looks_back = max(asking, default=1)
        acting = self.acting(True, True) or self.acting(True, False)
        # Whether nothing is left to be done when a single token was answered.
        self._idle = not (self.watching or acting or self.looks_back > 1) and self.window is None

    def acting(self, decoding: bool, context: bool) -> tuple[Any, ...]:
        """The parts that drop entries at such a pass; see Rules.acts."""
        known = self._acting.get((decoding, context))
        if known is None:
            known = tuple(own for own in self._parts if own.acts(decoding=decoding, context=context))
            self._acting[decoding, context] = known
        return known

    def _empty(self) -> Store:
        storage = self.policy.storage
        # A window within the exact tokens leaves nothing to be coded.
        coded = storage is not None and (self.window is None or self.window - 1 > storage.residual)
        return Store(storage.codec() if storage is not None and coded else None)

    # What the model calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @lasting
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        cache = self._cache() if self.index == 0 else None
        if cache is not None:
            cache.check_attached()
            self._check_rows(key_states.shape[0])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = {"keys": key_states, "values": value_states}
        if not self.store.groups:
            # Later, groups know what stands beside their entries, and begin it with zeros.
            for name in self._notes:
                new[name] = key_states.new_zeros(key_states.shape[:3], dtype=torch.float32)
        if self.turns is not None:
            new |= moving_rows(self, key_states)
        if self.record_past and self._in_parts():
            self.waiting = new
        else:
            self.take(new)
        return self, self

    def _check_rows(self, given: int) -> None:
        """One row would be read as several, or fail with words about tensors."""
        held = self.store.groups[0].rows["keys"].shape[0] if self.store.groups else given
        if held != given:
            raise ValueError(
                f"the cache holds {held} row{'' if held == 1 else 's'}, and the call has {given}: give as many, or "
                "first cache.batch_repeat_interleave(n) for n sequences of each row, or "
                "cache.batch_select_indices(rows) for some of them"
            )

    def take(self, new: dict[str, Tensor]) -> None:
        """Rows [b, H, n, ...] of the tokens that come next."""
        count = new["keys"].shape[2]
        if not self.store.groups and (count > 1 or self.store.codec is not None):
            self.store.adopt(new, self.seen)
        else:
            with without_gradient():
                if self.making_room and not self.record_past:
                    make_room(self, count)
                self.store.append(new, self.seen, self.spare)
        self.seen += count

    def _in_parts(self) -> bool:
        """Whether a pass that may be taken back is taken in parts, so that each token sees what it would see if it came
        alone: not where every entry is held and read, nor where nobody tells what of a first pass is certain. Who reads
        a part (and layers agree on it for a whole pass) does so for each token, except in a prompt."""
        if self.recorded:
            return False
        if self.policy.is_full:
            return self.policy.reads and self.guesses is not None and not self.seen
        return self.guesses is not None or (self.seen > 0 and self.drops)

    @property
    def drops(self) -> bool:
        """Whether entries leave while decoding."""
        return not self.policy.is_full and self.policy.acts(decoding=True)

    @property
    def context(self) -> int:
        """Slots before this one are of the context: what was fed first."""
        cache = self._cache()
        return 1 if cache is None else cache.context

    @property
    def protected(self) -> Tensor | None:
        """[b, n] of what was fed: which tokens are never dropped, where some are."""
        cache = self._cache()
        if cache is None or self.policy.protect is None or cache.shared.get("repeating"):
            return None
        found: Tensor | None = cache.protected
        if found is None or found.shape[1] < self.seen:
            raise ValueError(
                f"{type(self.policy).__name__}(protect=...) was not told what tokens came: call the model itself, with "
                "input_ids, not a part of it"
            )
        return found

    @property
    def guesses(self) -> int | None:
        """Tokens at the end of the pass that may be taken back, where its call tells."""
        cache = self._cache()
        return None if cache is None else cache.guesses

    def total(self) -> int:
        return self.seen + (0 if self.waiting is None else self.waiting["keys"].shape[2])

    @lasting
    def attend(self, query: Tensor, scoring: Scoring, seen: Visibility) -> Tensor:
        """query [b, h, n, d] -> [b, n, h, dv], as transformers' attention functions do."""
        lost = torch.is_grad_enabled() and query.requires_grad
        if self.waiting is None:
            lost = lost and self.store.groups[0].owned
            out = self.answer(query, scoring, seen)
        else:
            new, self.waiting = self.waiting, None
            out = in_parts(self, new, query, scoring, seen)
        return without_a_way_back(out) if lost else out

    def answer(self, query: Tensor, scoring: Scoring, seen: Visibility) -> Tensor:
        packed = pack(query, self.store.heads)
        part, self._made = None, []
        if self.policy.reads:
            self.read = None
            part = self.policy.read(self, packed, self.store.groups[0], scoring, seen)
        out = self.ordinary(packed, scoring, seen) if part is None else part
        single = packed.shape[3] == 1
        if not single or self.record_past or not self._idle or self.store.codec is not None:
            with without_gradient():
                self.finish(Pass(packed, scoring, seen, () if self.record_past else tuple(self._made)))
        self._made = []
        if single:
            return out.reshape(out.shape[0], 1, -1, out.shape[-1])
        return out.flatten(1, 2).transpose(1, 2).contiguous()

    def finish(self, done: Pass) -> None:
        """After a pass: what is over the budget leaves, or waits for `crop`."""
        if self.store.codec is not None:
            self.store.codec.observe(done.queries, done.seen)
        if self.record_past:
            self.recorded.append(done)
        else:
            shrink(self, [done])
        self._settle(done.seen)
        if self.making_room:
            single = done.queries.shape[3] == 1
            self.last = Pass(done.queries.detach(), done.scoring, done.seen) if single else done.last_queries(1)

    def _settle(self, seen: Visibility) -> None:
        self.store.own(self.spare)
        if self.store.codec is not None:
            pending = sum(done.queries.shape[3] for done in self.recorded)
            self.store.codec.settle(self.store.groups, self.spare, seen.real, pending)

    def placed(self, policy: Any, view: Any) -> None:
        """After the policy dropped entries of a group."""
        policy.placed(self, view)
        move_up(self, view)

    def ordinary(self, queries: Tensor, scoring: Scoring, seen: Visibility) -> Tensor:
        """Attention [b, g, r, n, dv] of the first queries of a pass, [b, g, r, n, d], to all that is held."""
        groups = self.store.groups
        if len(groups) == 1 and groups[0].in_order:
            out, made = attend_group(queries, groups[0], scoring, seen)
            self._made = [made]
            return out
        self._made, parts = [], list[Tensor]()
        for group in groups:
            own = scoring
            if scoring.sinks is not None:
                own = Scoring(scoring.scale, scoring.softcap, sinks_of(scoring, group, queries.shape[2]))
            part, made = attend_group(group.own_of(queries), group, own, seen)
            parts.append(part)
            self._made.append(made)
        return side_by_side(groups, parts)

    def decodes(self, count: int, offset: int) -> bool:
        """Whether a pass of so many tokens, fed after `offset` others, is decoding: one token, or some on trial."""
        return count == 1 or (self.record_past and offset > 0)

    @property
    def shared(self) -> dict[str, Any]:
        """What layers hand on to each other within a pass; not kept."""
        cache = self._cache()
        return {} if cache is None else cache.shared

    def spare(self, length: int, heads: list[int]) -> int:
        """Room to leave behind so many entries of these heads: up to their target and the policy's interval, where
        there is a target; else in proportion."""
        if self.window is not None and length >= self.window - 1:
            return max(8, self.window // 8)
        room = self.policy.room(self)
        if room is None or not self.store.groups:
            return room_for(length)
        target = float(int(self.policy.fixed_target(self)))
        if self.shares is not None:
            target = float(self.shares[:, heads].max()) * target
        return max(room, min(room_for(length), round(target) + room - length))

    @property
    def slack(self) -> int:
        """Entries by which a buffer may stand above its need before it is made anew."""
        return 0 if self.policy.room(self) is not None else room_for(max(self.store.lengths())) + 8

    # What generate asks.

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        self.record_past = True

    @lasting
    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens (given as a negative number), then drops what was waiting for that."""
        if not self.is_initialized:
            # An early exit never came here.
            return
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if remove > self.seen:
            raise ValueError(f"crop({tokens_to_remove}): the cache has seen {self.seen} tokens only")
        trial, self.trial = self.trial, None
        if trial is not None and remove <= trial.count:
            trial.take_back(self, remove)
            return
        recorded = sum(done.queries.shape[3] for done in self.recorded)
        if remove > recorded and not self._is_whole():
            raise ValueError(
                f"crop({tokens_to_remove}): layer {self.index} has dropped entries since; a shrunk cache takes back "
                "only tokens fed after activate_past_recording()"
            )
        if remove:
            self.seen -= remove
            self.store.truncate(self.seen)
        waiting, self.recorded = self.recorded, []
        passes = without_last(waiting, remove)
        if passes:
            shrink(self, passes)
        trim(self)

    def _is_whole(self) -> bool:
        return all(group.first == 0 for group in self.store.groups)

    def reset(self) -> None:
        self.store, self.seen, self.recorded, self.shares, self.last = self._empty(), 0, [], None, None
        self.memo, self.read, self.waiting, self.trial, self.heard = {}, None, None, None, ()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._on_batch(lambda row: row.index_select(0, beam_idx.to(row.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._on_batch(lambda row: row.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._on_batch(lambda row: row[indices.to(row.device), ...])

    @lasting
    def _on_batch(self, change: Any) -> None:
        self.store.on_batch(change)
        self.recorded = [done.on_batch(change) for done in self.recorded]
        self.heard = tuple(done.on_batch(change) for done in self.heard)
        if self.trial is not None:
            self.trial.on_batch(change)
        self.last = None if self.last is None else self.last.on_batch(change)
        self.memo = {name: change(own) for name, own in self.memo.items()}
        self.shares = None if self.shares is None or self.shares.shape[0] == 1 else change(self.shares)

    def offload(self) -> None:
        raise ValueError("a ragged cache is not offloaded: shrink it further, or use DynamicCache(offloading=True)")

    prefetch = offload


def without_gradient() -> AbstractContextManager[None]:
    """no_grad, where it is not on already: to find that out takes a tenth of its time."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


_NOTHING = nullcontext()


@remembered
def untraced_layer() -> type[RaggedLayer]:
    """For compiled models: a layer's shapes change with every token, and a graph that read them would be compiled anew
    as often. Made when asked for, since torch's compiler takes a second to import."""

    class Untraced(RaggedLayer):
        update = torch.compiler.disable(RaggedLayer.update)
        attend = torch.compiler.disable(RaggedLayer.attend)

    return Untraced
