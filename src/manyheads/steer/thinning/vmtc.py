"""VMTC and CMAI: the main image tokens as they are, the rest in clusters; and words kept from image tokens far from
their sense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import tap
from manyheads.steer.common import check_share, normalised
from manyheads.steer.method import Prompt, steering
from manyheads.steer.thinning.aim import runs
from manyheads.steer.thinning.patches import tower_layers
from manyheads.steer.thinning.tokens import Kept, Step, Thinning, on_image, text_layers, thinned


def clusters(tokens: Tensor, count: int, neighbours: int = 5) -> Tensor:
    """tokens [n, D] -> [n]: the number of the centre that each is nearest to; a centre is nearest to itself.

    Density peaks: density = exp(-mean squared distance to the k nearest others); a token's worth is its density times
    the distance to the nearest denser token (for the densest, to the farthest); the `count` worthiest are centres.
    Distances are divided by sqrt(D). Equal densities count in the order of the tokens.
    """
    n = len(tokens)
    apart = torch.cdist(tokens, tokens) / math.sqrt(tokens.shape[1])
    k = min(neighbours, n - 1)
    density = (
        (-apart.topk(k + 1, largest=False).values[:, 1:].square().mean(-1)).exp() if k else torch.ones_like(apart[0])
    )
    rank = density.argsort(descending=True, stable=True).argsort()
    denser = rank[None] < rank[:, None]
    nearest = apart.masked_fill(~denser, torch.inf).amin(-1)
    peak = torch.where(nearest.isinf(), apart.amax(-1), nearest) * density
    centres = peak.argsort(descending=True, stable=True)[:count].sort().values
    own = centres[apart[:, centres].argmin(-1)]
    own[centres] = centres
    return own


def focus(words: Tensor, image: Tensor) -> Tensor:
    """F[t, j] = sum_u A[t, u] A[u, j]: by way of words u. words [..., t, u], image [..., u, j]."""
    return words @ image


@contextmanager
def clustered(model: nn.Module, primary: float = 0.25, merged: float = 0.1, focused: float = 1.0) -> Iterator[Thinning]:
    """Claim: redundant image tokens draw attention from the instruction; merging them, and keeping words from image
    tokens that do not concern them, has the instruction followed more closely.

    Merging: of an image's n tokens the ceil(primary n) stay to which the tower's last class token attends most (mean
    of heads); the rest become ceil(merged n) clusters (`clusters`), each the mean of its tokens in the place of its
    centre, before layer 0. Masking, in every layer's prompt pass: F = sum_u A[t, u] A[u, j] over words u, per head; of
    image tokens j each word t behind the image sees the ceil(focused m) with the greatest F, of m that are there.
    primary 1, focused 1 change nothing.
    Source: arXiv 2411.15453, of which no code and not the exact equations were found: the clusters are density peaks,
    the product of attentions is one hop, and all constants are ours. With focused < 1 the words' attention to words is
    held, [b, h, t, t], and no larger matrix.
    """
    check_share("clustered: primary", primary), check_share("clustered: merged", merged)
    if not check_share("clustered: focused", focused) > 0:
        raise ValueError("clustered: focused is the share of image tokens that a word sees: above 0, at most 1")
    text_layers(model)
    tower = len(tower_layers(model))
    worth: list[Tensor] = []

    @torch.no_grad()
    def attended(call: Any) -> None:
        worth[:] = [opened(call, "clustered").weights(None, slice(0, 1)).mean(1)[:, 0, 1:]]

    def rule(step: Step) -> Kept | None:
        if step.layer or primary == 1:
            return None
        scores = worth.pop() if worth else None
        placed = None if scores is None else on_image(step.image, scores.flatten())
        if placed is None:
            raise ValueError(
                "clustered: the model has to see pixel_values in the same call, and to read the patches of its tower "
                'without the class token (vision_feature_select_strategy="default")'
            )
        return _merged(step, placed, primary, merged)

    with ExitStack() as stack:
        stack.enter_context(tap(model, attended, layers=[tower - 1], stack="vision", kind="self"))
        thinning = stack.enter_context(thinned(model, rule))
        if focused < 1:
            stack.enter_context(tap(model, _masking(thinning, focused), stack=text_stack(model), kind="self"))
        yield thinning


def _merged(step: Step, worth: Tensor, primary: float, merged: float) -> Kept:
    stays, states = ~step.image, step.states.clone()
    for row in range(len(states)):
        for image in runs(step.image[row]):
            places = torch.tensor(image, device=states.device)
            order = worth[row, places].argsort(descending=True, stable=True)
            few = math.ceil(primary * len(image))
            stays[row, places[order[:few]]] = True
            rest = places[order[few:].sort().values]
            count = min(math.ceil(merged * len(image)), len(rest))
            if count:
                own = clusters(step.states[row, rest].float(), count)
                for centre in sorted(set(own.tolist())):
                    states[row, rest[centre]] = step.states[row, rest[own == centre]].mean(0)
                    stays[row, rest[centre]] = True
    return Kept(stays, states)


def _masking(thinning: Thinning, focused: float) -> Any:
    def reader(call: Any) -> Tensor | None:
        # Backward runs the layer again when the pass is over.
        step = call.memo.setdefault("step", thinning.step(call.layer))
        return None if step is None else _focused(opened(call, "clustered"), step, focused)

    return reader


def _focused(call: AttentionCall, step: Step, share: float) -> Tensor:
    before = call.key.shape[2] - step.image.shape[1]
    order = torch.arange(step.image.shape[1], device=step.image.device)
    behind = step.text & (order > torch.where(step.image, order, len(order)).amin(1, keepdim=True))
    rows = behind.any(0).nonzero()[:, 0]
    if not len(rows):
        return call.output
    first, last = int(rows[0]), int(rows[-1]) + 1
    columns = step.image.any(0).nonzero()[:, 0]
    each = [call.weights(None, part)[..., before:] for part in call.blocks(None, slice(first, last))]
    to_words = torch.cat([part[..., first:last] for part in each], 2) * behind[:, None, None, first:last]
    to_image = torch.cat([part[..., columns] for part in each], 2)
    scores = focus(to_words, to_image).masked_fill(~step.image[:, None, None, columns], -torch.inf)
    count = (share * step.image.sum(1)).ceil().long()[:, None, None, None]
    hidden = (scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) >= count) & step.image[
        :, None, None, columns
    ]
    hidden = hidden & behind[:, None, first:last, None]

    def edit(weights: Tensor, part: slice) -> Tensor:
        low, high = max(part.start, first), min(part.stop, last)
        if low >= high:
            return weights
        weights = weights.clone()
        whole = weights[:, :, low - part.start : high - part.start]
        own = whole.clone()
        own[..., before + columns] = own[..., before + columns].masked_fill(hidden[:, :, low - first : high - first], 0)
        weights[:, :, low - part.start : high - part.start] = normalised(own, whole, call)
        return weights

    return call.mix(edit)


@steering(
    "clustered",
    title="main image tokens kept, the rest in clusters, words kept from what is off their focus (VMTC + CMAI)",
    source="arXiv 2411.15453 (abstract; the equations are ours)",
    kinds=("vision-language",),
    neutral={"primary": 1.0, "focused": 1.0},
    strength="primary",
    reach=(0.0, 1.0),
)
def _open(
    model: nn.Module, prompt: Prompt, *, primary: float = 0.25, merged: float = 0.1, focused: float = 1.0
) -> AbstractContextManager[Thinning]:
    return clustered(model, primary, merged, focused)
