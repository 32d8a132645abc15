"""Graphs that are drawn: communities under noise, and a question that is answered far away.

Nodes are to be labelled; edges, [b, 2, e], are sources above targets within each graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from manyheads.tasks.task import Batch, Generated, register_task, whole


class Graphs(NamedTuple):
    """features [b, n, f], edges [b, 2, e] and what each node is, [b, n]; -100 where nothing is asked. labels [b, e]: of
    what kind each edge is."""

    features: Tensor
    edges: Tensor
    targets: Tensor
    labels: Tensor

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """All graphs as one of b n nodes: features [1, b n, f], edges [2, b e], targets [1, b n]."""
        b, n, _ = self.features.shape
        offset = torch.arange(b)[:, None, None] * n
        edges = (self.edges + offset).transpose(0, 1).flatten(1)
        return self.features.flatten(0, 1)[None], edges, self.targets.flatten()[None]


def communities(
    count: int, rng: Generator, *, n: int = 64, kinds: int = 4, degree: int = 6, noise: float = 0.4, seen: float = 0.1
) -> Graphs:
    """Which community is each node of? Stochastic block graphs, whose nodes are drawn into `kinds` at random.

    Into each node lead `degree` edges, from its own community, or with chance `noise` from any node. A part `seen` of
    nodes show their community in their features [n, kinds + 1] (the last says that none is shown), one wrong in ten;
    the others have to be told from the nodes around. Asked of those that show nothing. Chance is 1 / kinds.
    """
    _sizes("communities", n=n, kinds=kinds, degree=degree, count=count)
    if not 0 <= noise <= 1 or not 0 < seen < 1:
        raise ValueError(f"communities: noise={noise}, seen={seen}; want noise from 0 to 1, and seen between them")
    kind = torch.randint(kinds, (count, n), generator=rng)
    own = (kind[:, :, None] == kind[:, None]).float() / (kind[:, :, None] == kind[:, None]).sum(-1, keepdim=True)
    likely = (1 - noise) * own + noise / n
    source = torch.multinomial(likely.flatten(0, 1), degree, replacement=True, generator=rng).view(count, n * degree)
    target = torch.arange(n).repeat_interleave(degree).expand(count, -1)
    shows = torch.rand(count, n, generator=rng) < seen
    wrong = torch.rand(count, n, generator=rng) < 0.1
    told = torch.where(wrong, torch.randint(kinds, (count, n), generator=rng), kind)
    features = torch.nn.functional.one_hot(torch.where(shows, told, kinds), kinds + 1).float()
    edges = torch.stack([source, target], 1)
    return Graphs(features, edges, kind.masked_fill(shows, -100), torch.zeros_like(source))


def far_away(count: int, rng: Generator, *, length: int = 8, rings: int = 4, kinds: int = 4) -> Graphs:
    """What does the other end of the ring hold? Rings of 2 `length` nodes each, in an order that is drawn anew.

    On each ring one node holds a mark of one of `kinds` and the one opposite it asks, `length` edges away whichever
    way one goes; the others hold noise that looks like neither. Edges lead both ways. Chance is 1 / kinds, as it stays
    for whoever sees fewer than `length` steps far, or all nodes at once without telling the rings apart.
    features [n, kinds + 2]: the mark, asks, noise. Edges one way round are of kind 0, the others of kind 1.
    """
    _sizes("far_away", length=length, rings=rings, kinds=kinds, count=count)
    around, n = 2 * length, 2 * length * rings
    place = torch.arange(n).view(rings, around)
    ahead = torch.stack([place, place.roll(-1, 1)]).flatten(1)
    order = torch.rand(count, n, generator=rng).argsort(1)
    edges = order[:, torch.cat([ahead, ahead.flip(0)], 1)]
    mark = torch.randint(kinds, (count, rings), generator=rng)
    features, targets = torch.zeros(count, n, kinds + 2), torch.full((count, n), -100)
    features[..., -1] = torch.randn(count, n, generator=rng)
    start, middle = order[:, place[:, 0]], order[:, place[:, length]]
    row = torch.arange(count)[:, None].expand_as(start)
    features[row, start, mark] = 1.0
    features[row, middle, kinds] = 1.0
    targets[row, middle] = mark
    labels = torch.arange(2).repeat_interleave(n).expand(count, -1)
    return Graphs(features, edges, targets, labels)


@dataclass(frozen=True, kw_only=True)
class _OverGraphs(Generated):
    pattern: ClassVar[str] = "graph"
    head: ClassVar[str] = "node-classification"
    beside: ClassVar[tuple[str, ...]] = ("labels",)
    eval_examples: int = 256
    kinds: int = 4

    def _batch(self, graphs: Graphs) -> Batch:
        inputs = {"node_features": graphs.features, "edges": graphs.edges, "edge_labels": graphs.labels}
        return Batch(inputs, graphs.targets)


@register_task
@dataclass(frozen=True, kw_only=True)
class Communities(_OverGraphs):
    """Which community is each node of, where few nodes show theirs and edges are noisy? See `communities`."""

    name: ClassVar[str] = "communities"
    title: ClassVar[str] = "Communities of a graph, under noise"
    n: int = 64
    degree: int = 6
    noise: float = 0.4
    seen: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument, low, high in (("n", 2, 65_536), ("kinds", 2, 1024), ("degree", 1, 1024)):
            whole(self, argument, getattr(self, argument), low, high)
        self._draw(1, Generator())

    def model_settings(self) -> dict[str, Any]:
        return {"num_node_features": self.kinds + 1, "num_labels": self.kinds}

    def sample(self, count: int, rng: Generator) -> Batch:
        return self._batch(self._draw(count, rng))

    def _draw(self, count: int, rng: Generator) -> Graphs:
        own = {"n": self.n, "kinds": self.kinds, "degree": self.degree}
        return communities(count, rng, noise=self.noise, seen=self.seen, **own)


@register_task
@dataclass(frozen=True, kw_only=True)
class FarAway(_OverGraphs):
    """What does the node on the other side of the ring hold, `length` edges away? See `far_away`."""

    name: ClassVar[str] = "far-away"
    title: ClassVar[str] = "What stands across a ring of a graph"
    length: int = 8
    rings: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument, low, high in (("length", 2, 4096), ("kinds", 2, 1024), ("rings", 1, 1024)):
            whole(self, argument, getattr(self, argument), low, high)

    @property
    def n(self) -> int:
        return 2 * self.length * self.rings

    def model_settings(self) -> dict[str, Any]:
        return {"num_node_features": self.kinds + 2, "num_labels": self.kinds}

    def sample(self, count: int, rng: Generator) -> Batch:
        return self._batch(far_away(count, rng, length=self.length, rings=self.rings, kinds=self.kinds))


def _sizes(what: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{what}: {name}={size!r}; want a whole number of at least 1")
