"""MustDrop: image tokens leave in the tower, in the prompt's pass and out of the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.taps import tap
from manyheads.steer.method import Prompt, steering
from manyheads.steer.thinning.patches import thinned_patches, tower_layers
from manyheads.steer.thinning.tokens import Kept, Step, Thinning, after_image, on_image, text_layers, thinned


def alike_windows(patches: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """patches [b, n, D] of a square grid -> the numbers [w, size^2] of each window's patches, row by row, and [b, w]:
    the mean cosine between two different patches of it."""
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1] or side % size or size < 2:
        raise ValueError(
            f"windows of {size} x {size} (from 2) must fill a square grid; it has {patches.shape[1]} patches"
        )
    grid = torch.arange(side * side, device=patches.device).view(side // size, size, side // size, size)
    windows = grid.transpose(1, 2).reshape(-1, size * size)
    unit = normalize(patches[:, windows], dim=-1)
    cosines = unit @ unit.transpose(-1, -2)
    pairs = size * size * (size * size - 1)
    return windows, (cosines.sum((-1, -2)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)) / pairs


def text_to_image(call: AttentionCall, words: Tensor) -> tuple[Tensor, Tensor]:
    """Head-mean attention from the words [b, q] to every token of the pass: its sum over them and the greatest, each
    [b, q]. In blocks of rows."""
    before = call.key.shape[2] - words.shape[1]
    first = int(words.any(0).long().argmax()) if bool(words.any()) else words.shape[1]
    total = torch.zeros(words.shape, device=words.device, dtype=torch.promote_types(call.query.dtype, torch.float32))
    most = torch.zeros_like(total)
    for rows in call.blocks(None, slice(first, None)):
        weights = call.weights(None, rows)[..., before:].mean(1) * words[:, rows, None]
        total, most = total + weights.sum(1), torch.maximum(most, weights.amax(1))
    return total, most


@contextmanager
def must_drop(
    model: nn.Module,
    globally: float = 0.01,
    individually: float = 0.01,
    *,
    layers: Sequence[int] | None = None,
    similarity: float = 0.8,
    window: int | None = None,
    key_share: float = 0.08,
) -> Iterator[Thinning]:
    """Claim: what an image token is worth shows at three times, and each has tokens to spare.

    Tower: after its first layer, windows of `window`^2 patches (3 by 3, or 2 where that fills the
    grid and 3 does not) whose mean pairwise cosine is at least `similarity`
    become one token, their mean. The ceil(key_share n) of the n patches of the tower to which its last layer's class
    token attends most (mean of heads) are keys and never leave later. Prompt: after each of `layers` (2, 6, 10, 14 of
    32, in proportion), image token j stays where sum_t A_tj >= globally * sum_tj A_tj, or max_t A_tj >= individually,
    or it is a key; A is the mean of heads, t the words after the image. Decoding: the caches from the first of `layers`
    on hold what stayed to the end; those below hold all. similarity above 1 and thresholds 0 change nothing.
    Source: arXiv 2411.10803, liuting20/MustDrop, for one row. There the thresholds come from scripts (the ones here are
    ours), merged tokens stand in front and positions move left; here a merged token has the place of its window's last
    patch, positions stay, and images of a batch are merged each by its own windows. There are no merged windows where
    they do not fill the grid: ValueError, or similarity above 1.
    """
    depth, tower = len(text_layers(model)), len(tower_layers(model))
    chosen = sorted({max(1, round(depth * own / 32)) for own in (2, 6, 10, 14)}) if layers is None else sorted(layers)
    wrong = [layer for layer in chosen if not 0 <= layer < depth - 1]
    if wrong or not 0 <= key_share <= 1 or globally < 0 or individually < 0:
        raise ValueError(
            f"must_drop: layers lie in 0 to {depth - 2}, shares and thresholds from 0; got {wrong or chosen}"
        )
    state = _State(similarity, window, key_share)
    kept: list[Tensor] = []

    def read(call: AttentionCall, step: Step) -> None:
        total, most = text_to_image(call, after_image(step))
        total = total * step.image
        few = (total < globally * total.sum(1, keepdim=True)) & (most < individually)
        kept[:] = [~few | state.keys(step)]

    def rule(step: Step) -> Tensor | None:
        if step.layer == 0:
            return state.there(step)
        return kept[0] if step.layer - 1 in chosen else None

    with (
        tap(model, state.attended, layers=[tower - 1], stack="vision", kind="self"),
        thinned_patches(model, state.merged),
        thinned(model, rule, watch=chosen, read=read, settle=chosen[0] if chosen else None) as thinning,
    ):
        yield thinning


class _State:
    """Of the tower's last pass: what of each image's n patches is there, and what is a key, [images, n]."""

    def __init__(self, similarity: float, window: int | None, key_share: float):
        self._similarity, self._window, self._share = similarity, window, key_share
        self._there: Tensor | None = None
        self._keys: Tensor | None = None
        self._own: Tensor | None = None

    def merged(self, layer: int, states: Tensor, there: Tensor) -> Kept | None:
        if layer == 0:
            self._there = there[:, 1:]
        if layer != 1 or self._similarity > 1:
            return None
        side = math.isqrt(states.shape[1] - 1)
        size = (3 if side % 3 == 0 or side % 2 else 2) if self._window is None else self._window
        windows, alike = alike_windows(states[:, 1:], size)
        stays, states = there.clone(), states.clone()
        for image, own in (alike >= self._similarity).nonzero().tolist():
            places = windows[own] + 1
            states[image, places[-1]] = states[image, places].mean(0)
            stays[image, places[:-1]] = False
        self._there = stays[:, 1:]
        return Kept(stays, states)

    @torch.no_grad()
    def attended(self, call: Any) -> None:
        """The last layer sees what is there, in order, its class token first."""
        if call.memo.setdefault("there", self._there) is not self._there or self._there is None:
            return  # backward runs the layer again
        to = opened(call, "must_drop").weights(None, slice(0, 1)).mean(1)[:, 0, 1:]
        self._keys = torch.zeros_like(self._there)
        for image, own in enumerate(self._there):
            places = own.nonzero()[:, 0]
            count = math.ceil(self._share * len(places))
            self._keys[image, places[to[image, : len(places)].topk(count).indices]] = True

    def there(self, step: Step) -> Tensor:
        """[b, q], before layer 0: no image token, or one of a patch that is there."""
        there, keys, self._there, self._keys = self._there, self._keys, None, None
        found = None if there is None else on_image(step.image, there.flatten())
        self._own = None if keys is None else on_image(step.image, keys.flatten())
        if found is None or self._own is None:
            raise ValueError(
                "must_drop: the model has to see pixel_values in the same call, and to read the patches of its tower "
                'without the class token (vision_feature_select_strategy="default")'
            )
        return ~step.image | found

    def keys(self, step: Step) -> Tensor:
        """[b, q]: which of the tokens that are still there are keys."""
        assert self._own is not None
        return self._own.gather(1, step.places)


@steering(
    "must_drop",
    title="image tokens dropped in the tower, the prompt and the cache (MustDrop)",
    source="arXiv 2411.10803",
    kinds=("vision-language",),
    neutral={"globally": 0.0, "individually": 0.0, "similarity": 2.0},
    strength="globally",
    reach=(0.0, 0.2),
    towers=(
        "image",
        "text",
    ),
)
def _open(
    model: nn.Module,
    prompt: Prompt,
    *,
    globally: float = 0.01,
    individually: float = 0.01,
    similarity: float = 0.8,
    window: int | None = None,
    key_share: float = 0.08,
) -> AbstractContextManager[Thinning]:
    return must_drop(model, globally, individually, similarity=similarity, window=window, key_share=key_share)
