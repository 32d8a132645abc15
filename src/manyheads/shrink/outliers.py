"""Scores that need no later query: leverage of keys as before rotation, and attention both ways within chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from manyheads.functional.rotary import turn
from manyheads.hosts.attend import Scoring, probabilities
from manyheads.shrink.compress import Pass, View
from manyheads.shrink.textorder import TextOrder, wide

# Added to the Gram matrix of sketched keys; the official number.
_RIDGE = 1e-2


def find_angles(name: str, model: Any, cache: Any) -> None:
    """How each layer's keys are turned, for `leverage`."""
    from manyheads.hosts.families import rotations

    try:
        found = rotations(model)
    except ValueError as error:
        reason = str(error).split(";")[0]
        raise ValueError(f"{name} cannot turn keys back: {reason}; rotary=False takes them as they are") from error
    for layer, angles in zip(cache.layers, found, strict=True):
        layer.angles = angles


def sketches(layer: int, heads: int, size: int, width: int, seed: int) -> Tensor:
    """[heads, size, width] Gaussian, the same in every run; of variance 1 / width."""
    draw = torch.Generator().manual_seed(seed + 7919 * layer)
    return torch.randn(heads, size, width, generator=draw, dtype=torch.float64) * width**-0.5


def leverage(view: View, counted: Tensor, sketch: int | None, seed: int) -> Tensor:
    """diag(X (X'X + ridge)^-1 X') of each head's keys before rotation, about their mean over the counted entries
    [b, g, m] and times a sketch; zero elsewhere. [b, g, m] float64."""
    keys = view.keys.double()
    if view.angles is not None:
        keys = turn(keys, -view.stands, view.angles.to(keys.device))
    weight = counted[..., None].to(keys.dtype)
    keys = keys.masked_fill(~counted[..., None], 0)
    centred = (keys - keys.sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1)) * weight
    if sketch is not None:
        heads = view.passes[-1].queries.shape[1]
        matrix = sketches(view.layer, heads, keys.shape[-1], sketch, seed).to(keys.device)
        centred = centred @ matrix.index_select(0, view.group.index)
    gram = centred.transpose(-1, -2) @ centred
    root = torch.linalg.cholesky(gram + _RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    half = torch.linalg.solve_triangular(root, centred.transpose(-1, -2), upper=False)
    return half.square().sum(-2)


def both_ways(done: Pass, keys: Tensor, index: Tensor, counted: Tensor, chunk: int) -> Tensor:
    """Attention that each key of a pass [b, g, n, d] gets from the queries of its chunk, before and after it, summed
    over queries and averaged over query heads, [b, g, n]. counted [b, n]: the tokens that are cut into chunks; others
    get 1, as a chunk of their own would. Scores are not scaled, as in the official kernel."""
    b, n = counted.shape
    order = (~counted).byte().argsort(dim=1, stable=True)
    queries = done.queries.index_select(1, index)
    r, d = queries.shape[2], queries.shape[4]
    found = torch.ones(b, keys.shape[1], n, device=keys.device, dtype=torch.promote_types(keys.dtype, torch.float32))
    count = counted.sum(1)
    for start in range(0, int(count.max()), chunk):
        at = order[:, start : start + chunk]
        real = torch.arange(start, start + at.shape[1], device=at.device) < count[:, None]
        q = queries.gather(3, at[:, None, None, :, None].expand(-1, keys.shape[1], r, -1, d))
        k = keys.gather(2, at[:, None, :, None].expand(-1, keys.shape[1], -1, d))
        seen = real[:, None, None, :].expand(-1, -1, at.shape[1], -1)
        made = probabilities(q, k, Scoring(1.0), seen) * real[:, None, None, :, None]
        made = made.sum(3).mean(2)
        place = at[:, None].expand_as(made)
        found.scatter_(2, place, torch.where(real[:, None], made, found.gather(2, place)))
    return found


def note_both_ways(view: View, name: str, chunk: int, first: int, last: int) -> None:
    """Writes `both_ways` of every new entry into a note; the first tokens of a row and the last of a pass are not cut
    into chunks."""
    new = sum(done.queries.shape[3] for done in view.passes)
    for done in view.passes:
        n = done.queries.shape[3]
        start = view.group.length - new
        new -= n
        slots = torch.arange(done.seen.offset, done.seen.offset + n, device=view.keys.device)
        real = done.seen.real(slots[None, None])[:, 0].expand(view.keys.shape[0], -1)
        place = real.long().cumsum(1)
        padding = done.seen.padding
        before = done.seen.offset if padding is None else padding[:, : done.seen.offset].sum(1, keepdim=True)
        counted = real & (place + before > first) & (place <= real.sum(1, keepdim=True) - last)
        keys = view.keys.narrow(2, start, n)
        view.note(name).narrow(2, start, n).copy_(both_ways(done, keys, view.group.index, counted, chunk))


def pooled(view: View, text: TextOrder, attention: Tensor, counted: Tensor) -> Tensor:
    """attention * ||v||, averaged with both neighbours in the text; the border counts as zeros."""
    sized = (wide(attention) * wide(view.values).norm(dim=-1)).masked_fill(~counted, 0)
    smooth = avg_pool1d(text.sort(sized), 3, stride=1, padding=1)
    return text.unsort(smooth)


def standard(score: Tensor, counted: Tensor) -> Tensor:
    """About the mean of a row's counted entries in all heads, in units of their deviation."""
    number = counted.sum((1, 2), keepdim=True)
    score = score.double().masked_fill(~counted, 0)
    off = (score - score.sum((1, 2), keepdim=True) / number.clamp_min(1)).masked_fill(~counted, 0)
    spread = (off.square().sum((1, 2), keepdim=True) / (number - 1).clamp_min(1)).sqrt()
    return off / spread.clamp_min(1e-6)
