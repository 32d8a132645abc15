"""How much of a head's attention goes how many hops away, and which heads attend alike.

    strength of hop k   mean over queries i of sum_{j: hops(i, j) = k} A_ij
hops: of patches the rings around one, max(|rows apart|, |columns apart|), of tokens |i - j|. What stands beside patches
(class, register tokens) is no patch: neither it nor the mass on it counts, so that strengths may sum to less than one.
    clusters            an autoencoder's two-dimensional code of every head's mean pattern, then k-means on the codes
Claim: heads of vision transformers fall into a few patterns, some near in every layer, others far in deep ones (Li et
al., arXiv 2303.13731). That neighbours at a corner are one hop away, and the autoencoder's sizes, are this file's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from manyheads.explain.attributions.feed import Feed
from manyheads.explain.attributions.grid import layout
from manyheads.explain.detectors.patterns import tokens
from manyheads.explain.detectors.reading import Measure, read
from manyheads.explain.detectors.subject import Sample, Samples, Subject
from manyheads.hosts.loading import Loaded

# Sides that a pattern is brought to before it is encoded.
_SIDE = 16


class Hops(Measure):
    """strengths() [layers, heads, hops]; patterns() [layers, heads, side, side], each the mean over samples."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.mass: dict[int, list[Tensor]] = {}
        self.maps: dict[int, list[Tensor]] = {}

    def call(self, call: Any, sample: Sample) -> None:
        n = tokens(call)
        found = layout(Feed(self.subject.model, sample.named), self.subject.stack)
        self.first, self.stop = (0, n) if found is None else (found.first, found.stop)
        at = torch.arange(self.stop - self.first, device=self.subject.device)
        self.places = at[:, None] if found is None else torch.stack([at // found.columns, at % found.columns], 1)
        self.sums = torch.zeros(call.heads, len(at) if found is None else max(found.rows, found.columns))
        self.sums = self.sums.double()
        self.whole = torch.zeros(call.heads, len(at), len(at))

    def block(self, call: Any, weights: Tensor, rows: slice, sample: Sample) -> None:
        start, stop = max(self.first, rows.start), min(self.stop, rows.stop)
        if start >= stop:
            return
        own = weights[0, :, start - rows.start : stop - rows.start, self.first : self.stop]
        queries, keys = self.places[start - self.first : stop - self.first], self.places[: own.shape[-1]]
        hops = (queries[:, None] - keys[None]).abs().amax(-1).flatten()
        self.sums.index_add_(1, hops.cpu(), own.flatten(1).double().cpu())
        self.whole[:, start - self.first : stop - self.first, : own.shape[-1]] = own.float().cpu()

    def done(self, call: Any, sample: Sample) -> None:
        self.mass.setdefault(call.layer, []).append(self.sums / (self.stop - self.first))
        self.maps.setdefault(call.layer, []).append(interpolate(self.whole[None], (_SIDE, _SIDE), mode="area")[0])

    def strengths(self) -> Tensor:
        return torch.stack([_mean(self.mass[layer]) for layer in sorted(self.mass)])

    def patterns(self) -> Tensor:
        return torch.stack([_mean(self.maps[layer]) for layer in sorted(self.maps)])


def _mean(samples: list[Tensor]) -> Tensor:
    if len({own.shape for own in samples}) > 1:
        raise ValueError("hops: inputs differ in length, so that their hops cannot be averaged: give them one by one")
    return torch.stack(samples).mean(0)


def hop_strengths(model: nn.Module | Loaded, *, stack: str | None = None, **where: Any) -> tuple[Tensor, Tensor]:
    """Strengths [layers, heads, hops] and mean patterns [layers, heads, 16, 16] of every head. where: inputs=, text=,
    length=, count=, seed= as in `detect`. ValueError where layers differ in heads or inputs in length."""
    subject = Subject(model, stack)
    measure = Hops(subject)
    read(subject, [(sample, [measure]) for sample in Samples(subject, **where).of("text")])
    if len({own[0].shape[0] for own in measure.mass.values()}) > 1:
        raise ValueError(f"hops: layers of {subject.name} differ in heads: their tables cannot be one")
    return measure.strengths(), measure.patterns()


@dataclass(frozen=True)
class Clusters:
    """labels [heads] from 0; codes [heads, 2] of the autoencoder; error: of what it makes of its codes, a share of the
    patterns' variance."""

    labels: Tensor
    codes: Tensor
    error: float


def cluster_heads(patterns: Tensor, clusters: int, *, seed: int = 0, steps: int = 300) -> Clusters:
    """patterns [..., side, side] of heads, all of them flattened to [heads]."""
    rows = patterns.flatten(0, -3).flatten(1).float()
    if not 1 <= clusters <= len(rows):
        raise ValueError(f"clusters={clusters}: want 1 to {len(rows)}, the number of heads")
    rows = (rows - rows.mean(0)) / rows.std().clamp_min(1e-12)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(rows.shape[1], 32), nn.Tanh(), nn.Linear(32, 2))
        decoder = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, rows.shape[1]))
        optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 0.01)
        for _ in range(steps):
            optimiser.zero_grad()
            loss = (decoder(encoder(rows)) - rows).square().mean()
            loss.backward()
            optimiser.step()
        codes = encoder(rows).detach()
        error = float((decoder(codes).detach() - rows).square().mean() / rows.var().clamp_min(1e-12))
        labels = nearest_centres(codes, clusters)
    return Clusters(labels, codes, error)


def nearest_centres(points: Tensor, count: int, starts: int = 10) -> Tensor:
    """k-means by Lloyd's steps from k-means++ starts, the best of several: [points] labels."""
    best, least = torch.zeros(len(points), dtype=torch.long), float("inf")
    for _ in range(starts):
        centres = points[torch.randint(len(points), (1,))]
        while len(centres) < count:
            far = torch.cdist(points, centres).amin(1).square() + 1e-12
            centres = torch.cat([centres, points[torch.multinomial(far, 1)]])
        for _ in range(50):
            labels = torch.cdist(points, centres).argmin(1)
            kept = [points[labels == i].mean(0) if bool((labels == i).any()) else centres[i] for i in range(count)]
            centres = torch.stack(kept)
        away = torch.cdist(points, centres)
        total = float(away.amin(1).square().sum())
        if total < least:
            best, least = away.argmin(1), total
    return best


def agreement(first: Tensor, second: Tensor) -> float:
    """The adjusted Rand index of two labellings: 1 the same up to names, about 0 by chance (Hubert and Arabie 1985)."""
    table = torch.zeros(int(first.max()) + 1, int(second.max()) + 1, dtype=torch.float64)
    table.index_put_((first, second), torch.ones(len(first), dtype=torch.float64), accumulate=True)

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    every = len(first) * (len(first) - 1) / 2
    expected, most = rows * columns / every, (rows + columns) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)
