"""AIM: image tokens that are alike are merged before the language model, and the least linked ones leave inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from manyheads.hosts.attend import Scoring
from manyheads.hosts.calls import AttentionCall
from manyheads.steer.method import Prompt, steering
from manyheads.steer.thinning.tokens import Kept, Step, Thinning, text_layers, thinned


def merge_pairs(tokens: Tensor, count: int) -> tuple[Tensor, list[list[int]]]:
    """tokens [n, D] -> fewer by `count`, [n - count, D], and for each the numbers of those that it is made of.

    Every second token (a: 0, 2, ...) looks for the most alike of the others (b: 1, 3, ...) by cosine; the `count` best
    pairs are merged, each b being the mean of itself and all that chose it. Order: what is left of a, most alike first,
    then b. Of n tokens at most (n + 1) // 2 can go, and none where there is no b.
    """
    first, second = tokens[0::2], tokens[1::2]
    count = min(count, len(first)) if len(second) else 0
    if count <= 0:
        return tokens, [[i] for i in range(len(tokens))]
    similarity, partner = (normalize(first, dim=-1) @ normalize(second, dim=-1).T).max(-1)
    order = similarity.argsort(descending=True, stable=True)
    gone, left = order[:count], order[count:]
    into = partner[gone][:, None].expand(-1, tokens.shape[1])
    merged = second.scatter_reduce(0, into, first[gone], "mean", include_self=True)
    made = [[2 * i] for i in left.tolist()]
    chosen = list(zip(gone.tolist(), partner[gone].tolist(), strict=True))
    made += [[2 * j + 1, *(2 * i for i, other in chosen if other == j)] for j in range(len(second))]
    return torch.cat([first[left], merged]), made


def page_rank(call: AttentionCall, live: Tensor, *, temperature: float = 0.1, steps: int = 5) -> Tensor:
    """[b, q]: how much attention ends at each of the q tokens of a pass. M = softmax(z / temperature) of the layer's
    scores z, per head; p starts evenly over the `live` [b, q] and becomes p M so many times; the result is
    sqrt(mean over heads of p^2). Made in blocks of rows. What goes to keys of earlier passes is lost."""
    scoring = call.scoring
    own = Scoring(scoring.scale / temperature, _softened(scoring.softcap, temperature), scoring.sinks)
    sharp = AttentionCall(call.site, call.query, call.key, call.value, call.mask, call.causal, own)
    before = call.key.shape[2] - live.shape[1]
    rank = (live / live.sum(1, keepdim=True).clamp_min(1)).float()[:, None].expand(-1, call.heads, -1)
    rank = rank.to(torch.promote_types(call.query.dtype, torch.float32))
    for _ in range(steps):
        parts = [rank[:, :, None, rows] @ sharp.weights(None, rows)[..., before:] for rows in sharp.blocks()]
        rank = torch.stack(parts).sum(0).squeeze(2)
    return rank.pow(2).mean(1).sqrt()


def _softened(softcap: float | None, temperature: float) -> float | None:
    # cap(s z / t) with a cap of c / t is cap(s z) / t.
    return None if softcap is None else softcap / temperature


@contextmanager
def merge_and_prune(
    model: nn.Module, merges: int = 2, start: int | None = None, fall: int | None = None
) -> Iterator[Thinning]:
    """Claim: image tokens are redundant before the language model, and lose their use inside of it by and by.

    Merging: of an image's n tokens, n / 2 are merged into others before layer 0, then n / 4 and so on, `merges` times
    (`merge_pairs`). Pruning: after layer l >= start of L, int(n' (1 - (l - start + 1) / fall)) of the n' tokens that
    entered stay, those to which most attention flows (`page_rank`, over words and image); words stay. start: L / 2 and
    fall 2 L / 7, both rounded, as the paper's 14 and 8 of 28 layers; start = L prunes nothing.
    merges 0 and start L change nothing.
    Source: arXiv 2412.03248, LaVi-Lab/AIM. There merged tokens stand in the order of `merge_pairs` at consecutive
    positions; here each has the place and position of the b that it was averaged into. There tokens are masked and
    go on being scored, and the count of row 0 is used for all; here they leave, and rows are counted on their own. An
    image is what stands without a gap; several side by side count as one.
    """
    depth = len(text_layers(model))
    start, fall = round(depth / 2) if start is None else start, max(1, round(depth * 2 / 7)) if fall is None else fall
    if merges < 0 or start < 0 or fall < 1:
        raise ValueError(f"merge_and_prune: merges and start from 0, fall from 1; got {merges}, {start}, {fall}")
    rank: list[Tensor] = []
    entered: list[Tensor] = []

    def read(call: AttentionCall, step: Step) -> None:
        rank[:] = [page_rank(call, step.image | step.text)]

    def rule(step: Step) -> Tensor | Kept | None:
        if step.layer == 0:
            found = merged(step, merges) if merges else None
            entered[:] = [(step.image if found is None else step.image & found.stays).sum(1)]
            return found
        share = 1 - (step.layer - start) / fall
        if step.layer <= start:
            return None
        keep = (entered[0] * max(0.0, share)).long()
        return top(step.image, rank[0], keep)

    with thinned(model, rule, watch=range(start, depth - 1), read=read) as thinning:
        yield thinning


def top(image: Tensor, scores: Tensor, keep: Tensor) -> Tensor:
    """[b, q] bool: not an image token, or one of the row's `keep` [b] best."""
    order = scores.masked_fill(~image, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return ~image | (place < keep[:, None])


def merged(step: Step, merges: int) -> Kept:
    """Image tokens of a step, merged image by image."""
    stays, states = ~step.image, step.states.clone()
    for row in range(len(states)):
        for image in runs(step.image[row]):
            tokens, made = step.states[row, image], [[i] for i in range(len(image))]
            for turn in range(merges):
                tokens, each = merge_pairs(tokens, len(image) // 2 ** (turn + 1))
                made = [[number for part in parts for number in made[part]] for parts in each]
            places = [image[numbers[0]] for numbers in made]
            stays[row, places] = True
            states[row, places] = tokens
    return Kept(stays, states)


def runs(image: Tensor) -> Sequence[list[int]]:
    """Of one row [q] bool: the places of each image."""
    found: list[list[int]] = []
    for place in image.nonzero()[:, 0].tolist():
        if found and found[-1][-1] == place - 1:
            found[-1].append(place)
        else:
            found.append([place])
    return found


@steering(
    "merge_and_prune",
    title="alike image tokens merged, the least linked dropped layer by layer (AIM)",
    source="arXiv 2412.03248",
    kinds=("vision-language",),
    neutral={"merges": 0, "start": 10**6},
    strength="merges",
    reach=(0, 4),
)
def _open(
    model: nn.Module, prompt: Prompt, *, merges: int = 2, start: int | None = None, fall: int | None = None
) -> AbstractContextManager[Thinning]:
    return merge_and_prune(model, merges, start, fall)
