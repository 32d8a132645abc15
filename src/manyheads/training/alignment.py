"""SongMASS: cross attention that is held to a known alignment of two sequences, and an alignment read off it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import opened
from manyheads.hosts.reading import without_graph
from manyheads.hosts.taps import tap


class AlignmentLosses(list[Tensor]):
    """One loss for every layer that was called."""

    def mean(self) -> Tensor:
        if not self:
            raise ValueError("alignment: no layer was called; run the model inside of the with block")
        return torch.stack(list(self)).mean()


@contextmanager
def alignment(
    model: nn.Module,
    aligned: Tensor,
    *,
    within: Tensor | None = None,
    queries: Tensor | None = None,
    power: Literal[1, 2] = 1,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
    kind: str = "cross",
) -> Iterator[AlignmentLosses]:
    """Gathers alignment_loss of the heads' mean weights at every chosen layer; add their mean to the loss of the task:

        with alignment(model, aligned, within=same) as losses:
            out = model(**batch)
        loss = out.loss + losses.mean()

    Cross attention of an encoder-decoder (kind="self": of one sequence to itself), or of any mechanism with weights.
    The model computes as ever. Gradient checkpointing: the model's own, with use_reentrant=False; the other way no
    weights have a graph, and it is refused."""

    def reader(call: Any) -> None:
        if without_graph():
            raise ValueError(
                f"alignment: {call.site.path} runs without a graph inside of reentrant gradient checkpointing: enable "
                "that with use_reentrant=False, or do without"
            )
        loss = alignment_loss(call.weights().mean(1), aligned, within=within, queries=queries, power=power)
        # Computed anew in backward too, since a checkpoint wants the same steps; counted once.
        if not call.memo.get("counted"):
            call.memo["counted"] = True
            losses.append(loss)

    losses = AlignmentLosses()
    with tap(model, reader, layers=layers, stack=stack, kind=kind):
        yield losses


def alignment_loss(
    weights: Tensor,
    aligned: Tensor,
    *,
    within: Tensor | None = None,
    queries: Tensor | None = None,
    power: Literal[1, 2] = 1,
) -> Tensor:
    """Mean over the queries i of

        sum_j s_ij |a_ij - t_ij|^power / sum_j s_ij,      t_ij = 1 / |A_i| for j in A_i, else 0

    weights a [b, n, m], heads averaged; aligned [b, n, m] bool: A_i; within s [b, n, m] bool: the keys of i's sentence,
    by default all; queries [b, n] bool: which count (padding does not). A query that is aligned to nothing is held to 0
    everywhere; one without keys within counts as 0. a = t gives 0.

    Source: Sheng et al., SongMASS, arXiv:2012.05168: power 1 in the paper, 2 in its released criterion, both averaged
    over layers and added to the task's loss with weight 1. There the sum over queries is divided by what divides the
    task's: its mean over tokens, as here."""
    if power not in (1, 2):
        raise ValueError(f"alignment_loss: power={power}; want 1 (the paper) or 2 (its code)")
    if aligned.shape != weights.shape or (within is not None and within.shape != weights.shape):
        raise ValueError(
            f"alignment_loss: weights {tuple(weights.shape)}, aligned {tuple(aligned.shape)}, within "
            f"{None if within is None else tuple(within.shape)}; want [batch, queries, keys] of all, heads averaged"
        )
    wide = torch.promote_types(weights.dtype, torch.float32)
    t = aligned.to(device=weights.device, dtype=wide)
    t = t / t.sum(-1, keepdim=True).clamp_min(1)
    s = torch.ones_like(t) if within is None else within.to(t)
    apart = (weights.to(wide) - t).abs()
    each = (apart**power * s).sum(-1) / s.sum(-1).clamp_min(1)
    real = torch.ones_like(each) if queries is None else queries.to(each)
    return (each * real).sum() / real.sum().clamp_min(1)


def same_number(queries: Tensor, keys: Tensor) -> Tensor:
    """[b, n, m] bool: the words, or sentences, of both have one number; numbers below 0 are of none. queries [b, n],
    keys [b, m]. [:, None] of it is a mechanism's dense mask."""
    return (queries[:, :, None] == keys[:, None]) & (queries >= 0)[:, :, None]


@contextmanager
def sentence_mask(
    model: nn.Module,
    within: Tensor,
    *,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
) -> Iterator[None]:
    """While open, cross attention sees the keys of the query's sentence alone: within [b, n, m] bool, from same_number
    of the sentences. A query whose sentence has no key that it may see sees what it always does. In training as in eval
    mode, for passes over the whole target: ValueError where a cache feeds it token by token (use_cache=False)."""

    def reader(call: Any) -> Tensor:
        own = opened(call, "sentence_mask")
        shape = (len(own.query), own.query.shape[2], own.key.shape[2])
        if within.shape != shape:
            raise ValueError(
                f"sentence_mask: within is {tuple(within.shape)}, and {own.site.path} reads {shape} (batch, queries, "
                "keys): make it of the batch that is fed, and feed that whole (use_cache=False)"
            )
        near = within[:, None].to(own.query.device)

        def change(scores: Tensor, rows: slice) -> Tensor:
            seen = own.visible(rows)
            kept = near[:, :, rows] if seen is None else near[:, :, rows] & seen
            return scores.masked_fill(~(kept | ~kept.any(-1, keepdim=True)), -torch.inf)

        return own.rescored(change)

    with tap(model, reader, layers=layers, stack=stack, kind="cross"):
        yield


def monotone_alignment(
    weights: Tensor, *, queries: Tensor | None = None, keys: Tensor | None = None, within: Tensor | None = None
) -> Tensor:
    """[b, n]: one key for each query, in order, so that the weights on the way are most:

        F(i, j) = a_ij + max_{j' <= j} F(i - 1, j'),      the way back from max_j F(n, j)

    weights a [b, n, m], of heads and layers that the caller averages. queries [b, n], keys [b, m] bool: what is real
    (padding on either side); padded queries get -1. within [b, n, m] bool: keys that a query may be given. Ties go to
    the earlier key. No gradient. The paper (arXiv:2012.05168) aligns by dynamic programming over its attention; its own
    recursion is not in its repository, and this one lets several queries share a key and keys go without, but gives no
    query two keys. ValueError: no alignment in order exists, by row."""
    b, n, m = weights.shape
    real = torch.ones(b, n, dtype=torch.bool) if queries is None else queries.bool().cpu()
    may = torch.ones(b, n, m, dtype=torch.bool) if within is None else within.bool().cpu()
    may = may if keys is None else may & keys.bool().cpu()[:, None]
    score = weights.detach().double().cpu().masked_fill(~may, -torch.inf)
    # A padded query adds nothing, wherever it stands.
    score = score.masked_fill(~real[..., None], 0.0)
    total, came = torch.zeros(b, m, dtype=torch.float64), []
    for i in range(n):
        best, at = _running_max(total)
        came.append(at)
        total = torch.where(real[:, i, None], score[:, i] + best, total)
    lost = (total.amax(1) == -torch.inf).nonzero()[:, 0].tolist()
    if lost:
        raise ValueError(
            f"monotone_alignment: rows {lost} have no alignment in order within the keys that they may have"
        )
    found, here = torch.full((b, n), -1), total.argmax(1)
    for i in reversed(range(n)):
        found[:, i] = torch.where(real[:, i], here, -1)
        here = torch.where(real[:, i], came[i].gather(1, here[:, None])[:, 0], here)
    return found.to(weights.device)


def _running_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """max over j' <= j of [b, m], and the first j' that has it."""
    best = values.cummax(1).values
    new = values > torch.nn.functional.pad(best, (1, 0), value=-torch.inf)[:, :-1]
    new[:, 0] = True
    at = torch.arange(values.shape[1]).expand_as(values).masked_fill(~new, 0)
    return best, at.cummax(1).values
