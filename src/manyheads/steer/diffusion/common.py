"""What interventions on a diffusion model share: when they act, on which rows of the batch, and attention with keys and
values that are not the call's own.

Shapes: r rows of the batch, h heads, n queries (patches), m keys, d key dim, e value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from manyheads.hosts.calls import AttentionCall, runs
from manyheads.hosts.calls import taken as taken
from manyheads.hosts.inside import softmax_call
from manyheads.hosts.sites import choose
from manyheads.hosts.taps import record, tap
from manyheads.models.flow import whole_captions

# (step from 0, layer of its kind from 0) -> whether the intervention acts there.
Active = Callable[[int, int], bool]
# Whether the pass that runs only tells what layers read, and is to be left as it is.
_aside: ContextVar[bool] = ContextVar("aside", default=False)
# A call, and the step that sampling stands at (None outside of it) -> the output [r, h, n, e] in its place, or None.
Change = Callable[[AttentionCall, Any], Tensor | None]


def until(share: float, steps: int, layers: Sequence[int] | None = None) -> Active:
    """The first `share` of so many steps, as released code cuts it (int(steps * share)); layers: only those."""
    if not 0 <= share <= 1 or steps < 1:
        raise ValueError(f"until wants a share of the steps from 0 to 1, and one step at least; got {share} of {steps}")
    return lambda step, layer: step < int(steps * share) and (layers is None or layer in layers)


def layers_in(model: nn.Module, part: str, *, kind: str = "self") -> list[int]:
    """Layers of the kind in a part of a UNet, "down", "middle" or "up" as its modules are called, for `until` and for
    layers=. Papers name them so: plug-and-play acts on the way up, FreeCustom in the last six of sixteen. ValueError
    for a part that the model does not have."""
    found = choose(model, kind=kind)
    layers = [site.layer for site in found if any(own.startswith(part) for own in site.path.split("."))]
    if not layers or not part:
        paths = [site.path.split(".") for site in found]
        depth = next(i for i in range(len(paths[0])) if len({own[i] for own in paths}) > 1 or i == len(paths[0]) - 1)
        parts = ", ".join(dict.fromkeys(own[depth] for own in paths))
        raise ValueError(f"layers_in: {type(model).__name__} has no part {part!r} that attends so; it has {parts}")
    return layers


@contextmanager
def changed(
    model: nn.Module,
    who: str,
    change: Change,
    *,
    kind: str,
    active: Active | None = None,
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """change(call, step) at every attention call of the kind where `active` says so. Which step it is the model's
    sampler tells (`model.step`): with `active` and no sampler running, ValueError."""

    def reader(call: Any) -> Tensor | None:
        if _aside.get():
            return None
        step = getattr(model, "step", None)
        if active is not None:
            if step is None:
                raise ValueError(f"{who}: active=... asks for a step, and none is told: run the model by its sample()")
            if not active(step.index, call.layer):
                return None
        return change(softmax_call(call, who), step)

    with tap(model, reader, layers=layers, kind=kind):
        yield


@contextmanager
def moving(model: Any, move: Callable[[Tensor, Any], Tensor]) -> Iterator[None]:
    """While open, the pictures of every step go through move(pictures, step) first."""
    own = model.moves()
    own.append(move)
    try:
        yield
    finally:
        own.remove(move)


@contextmanager
def correcting(model: Any, correct: Callable[[Tensor, Tensor, Tensor, Any], Tensor]) -> Iterator[None]:
    """While open, the velocity of every step goes through correct(velocity, the captions' own, pictures, step)."""
    own = model.corrections()
    own.append(correct)
    try:
        yield
    finally:
        own.remove(correct)


def halves(rows: int, step: Any) -> tuple[list[int], list[int]]:
    """Rows of a batch that read no caption, and those that do: all of them outside of sampling, and where a pass of a
    guided step is over its captions alone (as other interventions make it). ValueError for a batch of neither size."""
    every = list(range(rows))
    if step is None or rows == step.captions:
        return [], every
    if not step.guided or rows != 2 * step.captions:
        raise ValueError(f"a batch of {rows} rows in a step of {step.captions} captions: which are whose is not known")
    return every[step.unconditional], every[step.conditional]


def conditional(call: AttentionCall, step: Any) -> list[int]:
    """The rows of the call that read captions."""
    return halves(len(call.query), step)[1]


def parts(call: AttentionCall, step: Any) -> list[list[int]]:
    """The call's rows by half of a guided batch, those without captions first; one list where it has one half."""
    return [part for part in halves(len(call.query), step) if part]


def check_rows(who: str, rows: Sequence[int], count: int) -> list[int]:
    """Places in the list of captions."""
    wrong = [row for row in rows if not 0 <= row < count]
    if wrong or len(set(rows)) != len(rows):
        raise ValueError(f"{who}: rows {list(rows)} of {count} captions: want different ones from 0 to {count - 1}")
    return [int(row) for row in rows]


def attended(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, added: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + added) v, [r, h, n, e]; added: broadcasts to [r, h, n, m], -inf hides. A query that sees
    nothing gives zeros."""
    key, value = (per_head(rows, query.shape[1]) for rows in (key, value))
    if added is None:
        return scaled_dot_product_attention(query, key, value, scale=call.scale)
    added = added.to(query.dtype)
    blind = (added == -math.inf).all(-1, keepdim=True)
    out = scaled_dot_product_attention(query, key, value, added.masked_fill(blind, 0), scale=call.scale)
    return out.masked_fill(blind, 0)


def per_head(rows: Tensor, heads: int) -> Tensor:
    """Keys or values [r, g, m, e] as every query head reads them, [r, h, m, e]."""
    return rows if rows.shape[1] == heads else rows.repeat_interleave(heads // rows.shape[1], 1)


def replaced_rows(call: AttentionCall, rows: Sequence[int], output: Tensor) -> Tensor:
    """The call's output with these rows' [len(rows), h, n, e] in their place; the layer's own is not made where none of
    it stays."""
    if list(rows) == list(range(len(call.query))):
        return output.to(call.value.dtype)
    whole, start = call.output.clone(), 0
    for first, count in runs(rows):
        whole.narrow(0, first, count).copy_(output.narrow(0, start, count))
        start += count
    return whole


class Words(NamedTuple):
    """Keys [k, h, m, d] and values of k captions at one layer, and what of them is a word, [k, 1, 1, m] added."""

    key: Tensor
    value: Tensor
    added: Tensor


class Regions:
    """Regions that read captions of their own: output = own (1 - taken) + sum_k share_k softmax(scale q k_k^T) v_k.

    All captions are read at once, and what stays the same over the steps is made once: keys and values of the words
    side by side, by layer; shares by the size of the map.
    """

    def __init__(self, words: dict[str, Words]):
        self.words = words
        self._joined: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def read(self, call: AttentionCall, query: Tensor, shares: Tensor) -> Tensor:
        """query [r, h, n, d], shares [k, n] -> sum_k share_k CA_k, [r, h, n, e]."""
        key, value, added = self._of(call)
        count, words = shares.shape[0], key.shape[2] // shares.shape[0]
        scores = query @ key.mT + added
        weights = scores.unflatten(-1, (count, words)).softmax(-1) * shares.T.to(scores)[:, :, None]
        return weights.flatten(-2).to(value.dtype) @ value

    def _of(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [1, h, k m, d], scaled, and values of all captions' words, and what of them is none, [k m] added."""
        path = call.site.path
        if path not in self._joined:
            read, heads = self.words[path], call.query.shape[1]
            key, value = (per_head(own, heads).transpose(0, 1).flatten(1, 2)[None] for own in read[:2])
            self._joined[path] = key * call.scale, value, read.added.flatten()
        return self._joined[path]


def heard_words(model: Any, captions: Sequence[str]) -> dict[str, Words]:
    """What the cross attention layers read of these captions, by the path of the layer. Keys and values of captions
    depend on nothing else, so that one pass over blank pictures tells them."""
    captions = whole_captions(captions)
    ids, mask = model.encode(captions)
    blank = torch.zeros_like(model.noise(len(captions), 0))
    token = _aside.set(True)
    try:
        with torch.no_grad(), record(model, kind="cross") as calls:
            model(blank, blank.new_ones(len(captions)), ids, mask)
    finally:
        _aside.reset(token)
    hidden = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)[:, None, None]
    return {call.site.path: Words(call.key, call.value, hidden) for call in calls}


# -- regions -----------------------------------------------------------------------------------------------------------

# (top, left, bottom, right) in pixels, ends excluded.
Box = tuple[int, int, int, int]


def box_mask(model: Any, box: Box) -> Tensor:
    """[height, width], True inside of the box; ValueError where it leaves the picture or holds nothing."""
    size = model.config.image_size
    top, left, bottom, right = box
    if not (0 <= top < bottom <= size and 0 <= left < right <= size):
        raise ValueError(f"box {box} is no region (top, left, bottom, right) of a picture of {size} x {size} pixels")
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def on_patches(who: str, masks: Tensor, patches: int) -> Tensor:
    """[k, height, width] of pixels -> [k, patches], the nearest pixel of every patch: masks of regions may not leak
    into their neighbours, as they would by interpolation. Square grids only."""
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2]:
        raise ValueError(f"{who}: masks are {tuple(masks.shape)}; want [regions, height, width], square")
    side = math.isqrt(patches)
    if side * side != patches or masks.shape[1] % side:
        raise ValueError(
            f"{who}: masks of {masks.shape[1]} x {masks.shape[2]} pixels do not fit a grid of {patches} patches"
        )
    step = masks.shape[1] // side
    return masks[:, step // 2 :: step, step // 2 :: step].flatten(1)


class OnPatches:
    """Masks of pixels on the patches of a call, made once for every size of map."""

    def __init__(self, who: str, masks: Tensor):
        self.who, self.masks = who, masks
        self._made: dict[int, Tensor] = {}

    def of(self, call: AttentionCall) -> Tensor:
        """[k, n], where the call is; of numbers, in its precision."""
        n = call.query.shape[2]
        if n not in self._made:
            found = on_patches(self.who, self.masks, n).to(call.query.device)
            self._made[n] = found.to(call.query.dtype) if found.is_floating_point() else found
        return self._made[n]


def check_masks(who: str, model: Any, masks: Tensor) -> Tensor:
    """[k, height, width] of the model's pictures."""
    size = model.config.image_size
    if masks.ndim != 3 or tuple(masks.shape[1:]) != (size, size):
        raise ValueError(f"{who}: masks are {tuple(masks.shape)}; want [regions, {size}, {size}]")
    return masks
