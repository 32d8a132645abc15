"""Massive values in queries and keys: a few channels of a head that are far larger than its others.

    M_hd = sqrt(sum_i Q_ihd^2) over the sequence;   channel d is massive if M_hd > 5 mean_d' M_hd'
    score of a head = max_d M_hd / mean_d' M_hd'
Source: arXiv 2502.01563 (MingyuJ666/Rope_with_LLM), where such channels appear in Q and K under RoPE, not in V. Q and K
are read as they are scored, after rotation, which mixes the two channels of a pair: `pairs` gives sqrt of the sum of
both channels' M^2, the same before and after rotation, from the fastest frequency to the slowest. Over several samples
M is over all of their tokens. A query head has its KV head's keys.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.detectors.reading import Measure, even, read
from manyheads.explain.detectors.subject import Sample, Samples, Subject
from manyheads.hosts.calls import opened
from manyheads.hosts.loading import Loaded

LAMBDA = 5.0


@dataclass(frozen=True)
class Channels:
    """norms [layers, heads, d] over the sequence; pairs [layers, heads, d' / 2] by RoPE's frequency, fast to slow, or
    None without RoPE."""

    norms: Tensor
    pairs: Tensor | None

    @property
    def ratio(self) -> Tensor:
        """[layers, heads]: the greatest channel to the mean."""
        return self.norms.amax(-1) / self.norms.mean(-1)

    def massive(self, factor: float = LAMBDA) -> list[tuple[int, int, int]]:
        """(layer, head, channel)"""
        large = self.norms > factor * self.norms.mean(-1, keepdim=True)
        return [(int(layer), int(head), int(d)) for layer, head, d in large.nonzero()]

    def frequencies(self) -> Tensor:
        """[layers, heads]: which of the pairs is the greatest, 0 the fastest to 1 the slowest."""
        if self.pairs is None:
            raise ValueError("this model has no RoPE, so that its channels have no frequency")
        return self.pairs.argmax(-1) / max(1, self.pairs.shape[-1] - 1)


class Massive(Measure):
    """Reads `which` ("query", "key" or "value") of every call."""

    needs_weights = False

    def __init__(self, which: str):
        if which not in ("query", "key", "value"):
            raise ValueError(f"massive values are those of query, key or value; got {which!r}")
        self.which, self.squares = which, {}  # type: ignore[var-annotated]

    def call(self, call: Any, sample: Sample) -> None:
        rows = getattr(opened(call, f"massive-{self.which}"), self.which)[0].double().square().sum(1).cpu()
        rows = rows.repeat_interleave(call.heads // rows.shape[0], 0)
        self.squares[call.layer] = self.squares.get(call.layer, 0) + rows

    def norms(self) -> Tensor:
        return torch.stack([self.squares[layer] for layer in sorted(self.squares)]).sqrt()

    def scores(self) -> dict[str, Tensor]:
        rows = [self.squares[layer].sqrt() for layer in sorted(self.squares)]
        return {f"massive-{self.which}": even([own.amax(-1) / own.mean(-1) for own in rows])}


def massive_values(
    model: nn.Module | Loaded, which: str = "query", *, stack: str | None = None, **where: Any
) -> Channels:
    """Channel norms of every head; where: inputs=, text=, length=, count=, seed= as in `detect`."""
    subject = Subject(model, stack)
    measure = Massive(which)
    read(subject, [(sample, [measure]) for sample in Samples(subject, **where).of("text")])
    norms = measure.norms()
    partners = rotary_partners(subject, norms.shape[-1]) if which != "value" else None
    if partners is None:
        return Channels(norms, None)
    first = torch.tensor([d for d, other in enumerate(partners) if d < other])
    second = torch.tensor([partners[int(d)] for d in first])
    return Channels(norms, (norms[..., first].square() + norms[..., second].square()).sqrt())


def rotary_partners(subject: Subject, dim: int) -> list[int] | None:
    """Channel -> the channel that RoPE turns it with, of the rotated ones; None where the model has no RoPE. Halves or
    neighbours: asked of the model's own function."""
    module = subject.sites[0].module
    own = sys.modules[type(module).__module__]
    rotate = getattr(own, "rotate_half", None) or getattr(own, "rotate_every_two", None)
    if rotate is None:
        return None
    turned = int(dim * _rotated(subject.config))
    if not turned:
        return None
    places = torch.arange(1.0, turned + 1)[None, None, None]
    return [int(place.abs()) - 1 for place in rotate(places).flatten()]


def _rotated(config: Any) -> float:
    """The share of a head's channels that RoPE turns; none is an answer too."""
    found = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
    found = getattr(config, "partial_rotary_factor", None) if found is None else found
    return 1.0 if found is None else float(found)
