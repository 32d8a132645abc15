"""When and how a layer drops entries: the view that a policy's rule is given, and the steps around the rule.

Legend: b batch, H KV heads, g heads of a group, r query heads on each, n queries, m entries held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyheads.hosts.attend import Scoring, probabilities, query_blocks, received, with_bias
from manyheads.shrink.group import Group
from manyheads.shrink.ranking import best_of
from manyheads.shrink.targets import Targets, find_targets, less

if TYPE_CHECKING:
    from manyheads.hosts.visibility import Visibility


# How far each entry was moved, where keys are.
MOVED = "moved"


@dataclass(frozen=True)
class Pass:
    """Queries [b, g, r, n, d] of one forward pass over all KV heads, and what they might see."""

    queries: Tensor
    scoring: Scoring
    seen: Visibility
    # Of a single query: its weights on each group, [b, g, r, 1, m] or [b * g, r, m], where attention made them.
    weights: tuple[Tensor | None, ...] = ()

    def first_queries(self, count: int) -> Pass:
        some = self.queries[:, :, :, :count]
        # A copy: a slice, even an empty one, would hold on to the whole pass' memory.
        return Pass(some if self.queries.shape[3] == 1 else some.clone(), self.scoring, self.seen)

    def last_queries(self, count: int) -> Pass:
        n = self.queries.shape[3]
        start = max(0, n - count)
        some = self.queries[:, :, :, start:].detach()
        return Pass(some if n == 1 else some.clone(), self.scoring, self.seen.part(start, n))

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> Pass:
        return replace(self, queries=change(self.queries), seen=self.seen.on_batch(change), weights=())


@dataclass
class View:
    """What a policy's rule sees: the entries of one group of heads, and the queries that just passed."""

    group: Group
    # The group's place among the layer's.
    place: int
    passes: list[Pass]
    layer: int
    layers: int
    # Tokens fed so far: the slot of the next one.
    total: int
    window: int | None
    # [b or 1, g or 1]: entries that the heads of the group may keep; set before score is asked.
    targets: Tensor | None = None
    # What the policy keeps for the layer as a whole, rows of the batch first; and how the layer's keys are turned.
    memo: dict[str, Tensor] = field(default_factory=dict)
    angles: Tensor | None = None
    # Tokens that are about to be fed, where room is made for them.
    coming: int = 0
    # What layers hand on to each other within a pass.
    shared: dict[str, Any] = field(default_factory=dict)
    # [b, n] of what was fed: tokens that are never dropped, where some are.
    protected: Tensor | None = None

    @cached_property
    def keys(self) -> Tensor:
        """To be written by `put` alone: what is here may have been decoded."""
        return self.group.view("keys")

    @cached_property
    def values(self) -> Tensor:
        return self.group.view("values")

    def note(self, name: str) -> Tensor:
        """What a policy keeps beside every entry, [b, g, m] float32; to be written in place."""
        return self.group.view(name)

    def put(self, at: Tensor, **rows: Tensor) -> None:
        """Overwrites the entries at the places `at` [b, g, s]: keys, values or notes, [b, g, s, ...]."""
        for name, row in rows.items():
            self.group.put(name, at, row)
            self.__dict__.pop(name, None)

    @cached_property
    def slots(self) -> Tensor:
        """[b, g, m]: each entry's place in what was fed, -1 where a row holds nothing."""
        return self.group.slots().expand(self.group.rows["keys"].shape[0], len(self.group.heads), -1)

    @cached_property
    def positions(self) -> Tensor:
        """[b, g, m]: how many real tokens of its row stand before each entry."""
        padding = self.passes[-1].seen.padding
        if padding is None:
            return self.slots.long()
        before = padding.long().cumsum(1) - 1
        at = self.slots.clamp(0, padding.shape[1] - 1).long()
        return before.gather(1, at.flatten(1)).view(at.shape)

    @property
    def stands(self) -> Tensor:
        """[b, g, m]: the position that each key is turned to: its own, unless keys were moved up."""
        return self.positions + self.note(MOVED).round().long() if MOVED in self.group.rows else self.positions

    @cached_property
    def count(self) -> Tensor:
        """[b or 1]: real tokens fed to each row."""
        padding = self.passes[-1].seen.padding
        if padding is None:
            return torch.tensor([self.total], device=self.group.index.device)
        return padding[:, : self.total].sum(1)

    @property
    def fed(self) -> Tensor:
        """[b or 1]: real tokens of each row, those that are coming included."""
        return self.count + self.coming

    @cached_property
    def alive(self) -> Tensor:
        """[b, g, m]: whether a coming token could see the entry: not padding, and not behind the window."""
        seen, slots = self.passes[-1].seen, self.slots
        if seen.tensor is not None:
            n = self.passes[-1].queries.shape[3]
            last = seen.allowed(slice(n - 1, n), slots)[:, :, 0]
            last = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
            alive = last.expand(slots.shape)
        else:
            alive = seen.real(slots).expand(slots.shape)
        return alive if self.window is None else alive & (slots > self.total - self.window)

    def guarded(self, score: Tensor) -> Tensor:
        """The score [b, g, m] with protected entries above all, and minus infinity where nothing lives."""
        if (kept := self.kept) is not None:
            score = score.clamp_max(torch.finfo(score.dtype).max).masked_fill(kept, torch.inf)
        return score.masked_fill(~self.alive, -torch.inf)

    @cached_property
    def kept(self) -> Tensor | None:
        """[b, g, m]: protected entries that live."""
        if self.protected is None:
            return None
        at = self.slots.clamp_min(0).long()
        return self.protected.to(at.device).gather(1, at.flatten(1)).view(at.shape) & self.alive

    def received(self) -> Tensor:
        """[b, g, m]: attention that the entries got from the passes' real queries, summed over query heads."""
        if len(self.passes) == 1 and self.passes[0].seen.padding is None:
            made = self._made(self.passes[0])
            if made is not None:
                return made[0].sum((2, 3))
        total = torch.zeros_like(self.keys[..., 0], dtype=torch.float32)
        for done in self.passes:
            n, first = done.queries.shape[3], self.group.first
            if (made := self._made(done)) is not None:
                total += (made[0] * made[1]).sum((2, 3))
                continue
            whole = first is not None and first + self.group.length == done.seen.offset + n
            if whole and done.scoring.plain and done.seen.plain and done.seen.padding is None and self.window is None:
                total += received(self._queries(done), self.keys, done.scoring.scale)
                continue
            for block, real in self._blocks(done, 0):
                total += (block * real).sum((2, 3))
        return total

    def latest(self, last: int | Tensor) -> tuple[int, Tensor | None]:
        """How many of the passes' queries hold the last real ones of every row, and which of them do, [b, queries];
        None where all do. last: how many of each row, or of each [b]."""
        count = sum(done.queries.shape[3] for done in self.passes)
        real = torch.ones((1, count), dtype=torch.bool, device=self.group.index.device)
        if (padding := self.passes[-1].seen.padding) is not None:
            places = [(done.seen.offset, done.queries.shape[3]) for done in self.passes]
            real = torch.cat([padding[:, offset : offset + n] for offset, n in places], 1)
        if isinstance(last, int) and (padding is None or bool(real[:, -last:].all())):
            return min(count, last), None
        # Padding may stand behind a row's text as well as before it.
        left = real.long().flip(1).cumsum(1).flip(1)
        wanted = real & (left <= (last if isinstance(last, int) else last[:, None]))
        skip = int(wanted.any(0).byte().argmax())
        return count - skip, wanted[:, skip:]

    def weights(self, last: int | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of attention [b, g, r, rows, m], and which of them are last real queries, [b, 1, 1, rows, 1]."""
        (back, wanted), at = self.latest(last), 0
        skip = sum(done.queries.shape[3] for done in self.passes) - back
        for done in self.passes:
            n = done.queries.shape[3]
            for block, real in self._blocks(done, skip) if skip < n else ():
                end = at + block.shape[3]
                yield block, real if wanted is None else wanted[:, None, None, at:end, None]
                at = end
            skip = max(0, skip - n)

    def _made(self, done: Pass) -> tuple[Tensor, Tensor] | None:
        """The weights that attention made of a single query, and whether it is real."""
        made = done.weights[self.place] if done.weights else None
        if made is None:
            return None
        b, _, r, _, _ = done.queries.shape
        made = made.reshape(b, len(self.group.heads), r, 1, -1)
        if done.seen.padding is None:
            return made, torch.ones((1,) * 5, dtype=torch.bool, device=made.device)
        own = torch.full((1, 1, 1), done.seen.offset, device=made.device)
        return made, done.seen.real(own).view(-1, 1, 1, 1, 1)

    def _queries(self, done: Pass) -> Tensor:
        whole = self.group.in_order and done.queries.shape[1] == len(self.group.heads)
        return done.queries if whole else self.group.own_of(done.queries)

    def _blocks(self, done: Pass, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Never more than one block of queries at a time."""
        if (made := self._made(done)) is not None:
            yield made
            return
        queries, scoring, slots = self._queries(done), done.scoring, self.group.slots()
        if scoring.sinks is not None:
            sinks = scoring.sinks.view(-1, queries.shape[2]).index_select(0, self.group.index).flatten()
            scoring = replace(scoring, sinks=sinks)
        for rows in query_blocks(queries[:, :, :, skip:], self.group.length):
            rows = slice(rows.start + skip, rows.stop + skip)
            seen = with_bias(done.seen.allowed(rows, slots), self.group.bias())
            own = torch.arange(rows.start, rows.stop, device=slots.device) + done.seen.offset
            real = done.seen.real(own[None, None]).view(-1, 1, 1, rows.stop - rows.start, 1)
            yield probabilities(queries[:, :, :, rows], self.keys, scoring, seen), real


def shrink(layer: Any, passes: list[Pass]) -> None:
    """After attention: notes are brought up to date, and what is over the policy's budget leaves."""
    decoding = passes[-1].queries.shape[3] == 1 or (layer.record_past and passes[-1].seen.offset > 0)
    views = None
    if layer.watching:
        views = _views(layer, passes)
        for own in layer.watching:
            for view in views:
                own.observe(view)
    for i, own in enumerate(layer.acting(decoding, passes[0].seen.offset < layer.context)):
        asked, least = passes, own.interval if decoding else 1
        if i or layer.heard:
            # Attention's own weights are of entries that may have left.
            asked, views = [replace(done, weights=()) for done in passes] if i else passes, None
            asked = [*layer.heard, *asked] if own.looks_back > 1 else asked
        _evict(layer, own, asked, views, coming=0, least=least, fresh=not decoding)
    if layer.looks_back > 1:
        _hear(layer, passes)
    if layer.window is not None and not layer.record_past:
        trim(layer)


def _hear(layer: Any, passes: list[Pass]) -> None:
    """Keeps the latest queries for parts that will ask for more than those of one token."""
    every, left, kept = [*layer.heard, *passes], layer.looks_back, list[Pass]()
    if passes[-1].seen.padding is not None:
        left = _views(layer, every)[0].latest(left)[0]
    for done in reversed(every):
        if left > 0:
            kept.append(done.last_queries(left) if done.weights or done.queries.shape[3] > left else done)
            left -= done.queries.shape[3]
    layer.heard = tuple(kept[::-1])


def make_room(layer: Any, coming: int) -> None:
    """Before tokens come, for policies whose rule needs no scores: after this pass the budget still holds."""
    if layer.last is None:
        return
    context = layer.seen < layer.context
    for own in layer.making_room:
        if own.acts(decoding=coming == 1, context=context):
            _evict(layer, own, [layer.last], None, coming=coming, least=own.interval, fresh=False)


def _views(layer: Any, passes: list[Pass], coming: int = 0) -> list[View]:
    fixed = (layer.index, layer.layers, layer.seen, layer.window)
    own = {"memo": layer.memo, "angles": layer.angles, "coming": coming, "shared": layer.shared}
    own["protected"] = layer.protected
    return [View(group, place, passes, *fixed, **own) for place, group in enumerate(layer.store.groups)]


def _evict(
    layer: Any, policy: Any, passes: list[Pass], views: list[View] | None, *, coming: int, least: int, fresh: bool
) -> None:
    """Down to the targets, where some head is at least `least` entries above its own (with those that are coming)."""

    def shown() -> list[View]:
        return _views(layer, passes, coming) if views is None else views

    if fresh and policy.allocation is not None:
        views = shown()
        targets = _shared_out(layer, policy, views, coming)
    else:
        found = find_targets(layer, policy, passes[-1].seen, coming, fresh, lambda: shown()[0])
        if found.over < least:
            return
        views = shown()
        if found.over == 1 and found.even is not None and _replaces(layer, policy, views, found):
            return
        targets = found.entries
    _set_targets(views, targets)
    layer.store.evict([_keep(policy, view) for view in views], layer.spare, layer.slack)
    _tell_placed(layer, policy, passes)


def _tell_placed(layer: Any, policy: Any, passes: list[Pass]) -> None:
    if policy.places or layer.turns is not None:
        for view in _views(layer, passes):
            layer.placed(policy, view)


def _shared_out(layer: Any, policy: Any, views: list[View], coming: int) -> Tensor:
    """Targets from the policy's allocation. Shares of the budget are given out once, on the whole prompt; later tokens
    keep to them."""
    base = policy.mean_target(layer, views[0])
    # What a head keeps whatever its budget is not there to be shared out.
    spared = policy.smallest - 1
    above = (base - spared).clamp_min(1), layer.index, layer.layers, (views[0].count.cpu() - spared).clamp_min(0)
    mean = spared + policy.allocation.of_layer(*above)
    targets = less(policy, policy.targets(mean, layer, len(layer.store.lengths())), coming)
    _set_targets(views, targets)
    targets = policy.allocation.of_heads(_all_scores(policy, views), targets.to(views[0].group.index.device)).cpu()
    layer.shares = targets.double() / base.floor()[:, None].clamp_min(1)
    return targets


def _replaces(layer: Any, policy: Any, views: list[View], targets: Targets) -> bool:
    """Decoding as it mostly is: every head is one entry over, and every row holds one at every place. Then the last
    entry takes the place of the one that leaves, and nothing is ranked or counted."""
    passes, groups = views[0].passes, layer.store.groups
    seen = passes[-1].seen
    plain = seen.padding is None and seen.tensor is None and layer.window is None
    if not plain or not policy.drops_alone or layer.protected is not None:
        return False
    for group in groups:
        if not group.simple or not _fits(layer, group):
            return False
    for view in views:
        view.targets = targets.even
        view.group.replace(policy.worst(view))
    _tell_placed(layer, policy, passes)
    return True


def _fits(layer: Any, group: Group) -> bool:
    """Whether a buffer stands above need by no more than its layer grants. What did at fewer entries still does."""
    if group.fitted is None or group.fitted[0] != group.capacity or group.fitted[1] > group.length:
        if group.capacity > group.length + layer.spare(group.length, group.heads) + layer.slack:
            return False
        group.fitted = group.capacity, group.length
    return True


def _set_targets(views: list[View], targets: Tensor) -> None:
    for view in views:
        view.targets = targets[:, view.group.heads].to(view.group.index.device)


def _keep(policy: Any, view: View) -> Tensor | None:
    """[b, g, m], or None where no head of the group is over its target."""
    assert view.targets is not None
    if view.group.length <= int(view.targets.min()):
        return None
    keep = policy.merge(view, best_of(view.guarded(policy.score(view)), view.targets) & view.alive)
    if (kept := view.kept) is None:
        return keep
    most = kept.sum(-1)
    if bool((most > view.targets).any()):
        raise ValueError(
            f"{type(policy).__name__}: protect names {int(most.max())} tokens that are never dropped, and a head of "
            f"layer {view.layer} may keep {int(view.targets.min())}: give a larger one"
        )
    return keep | kept


def _all_scores(policy: Any, views: list[View]) -> Tensor:
    """[b, H, m] over all groups, minus infinity where a head holds nothing."""
    parts = [view.guarded(policy.score(view)) for view in views]
    most = max(part.shape[2] for part in parts)
    parts = [torch.nn.functional.pad(part, (0, most - part.shape[2]), value=-torch.inf) for part in parts]
    order = torch.cat([view.group.index for view in views]).argsort()
    return torch.cat(parts, 1).index_select(1, order)


def trim(layer: Any) -> None:
    """A sliding layer forgets what no coming token can see."""
    if layer.window is None:
        return
    for group in layer.store.groups:
        if group.first is not None and group.length > layer.window - 1:
            group.drop_oldest(group.length - (layer.window - 1))
