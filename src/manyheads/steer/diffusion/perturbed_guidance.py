"""Guidance away from the same model with chosen heads put out, and the search for the heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from manyheads.hosts.sites import choose
from manyheads.steer.common import Heads, parse_heads
from manyheads.steer.diffusion.common import Active, correcting
from manyheads.steer.diffusion.drawing import Drawing, Rows, drawn_with, some_steps
from manyheads.steer.method import steering
from manyheads.steer.perturb import perturb


@contextmanager
def perturbed_guidance(
    model: Any, heads: Heads | None, *, amount: float = 1.0, scale: float = 1.0, active: Active | None = None
) -> Iterator[None]:
    """Claim: away from a copy of the model whose chosen heads look at themselves, samples gain structure.

    v <- v + w (v_c - v_weak), w = scale, beside whatever classifier-free guidance made v. v_weak: the captions'
    velocity with A' = (1 - u) A + u I in the chosen self-attention heads ((layer, head) pairs; None: all), u = amount
    (`perturb`). scale 0 or amount 0 changes nothing. active(step, 0): the steps that are guided.
    Source: arXiv 2506.10978 (SoftPAG); the base method for whole layers is Perturbed-Attention Guidance (2403.17377).
    Costs one more pass over the captions a step. No official code was at hand: the equation is the paper's.
    """
    with perturb(model, amount, heads=heads):  # refuses now what it would refuse at the first step
        pass

    def correct(velocity: Tensor, told: Tensor, pictures: Tensor, step: Any) -> Tensor:
        if scale == 0 or amount == 0 or (active is not None and not active(step.index, 0)):
            return velocity
        with perturb(model, amount, heads=heads):
            weak: Tensor = model.velocities(pictures, step.time, step.ids, step.mask)
        return velocity + scale * (told - weak)

    with correcting(model, correct):
        yield


def hunt_heads(
    objective: Callable[[list[tuple[int, int]]], float],
    candidates: Sequence[tuple[int, int]],
    *,
    rounds: int,
    take: int = 1,
) -> list[tuple[int, int]]:
    """HeadHunter: in each round every candidate is added to what is chosen, scored by objective(heads), and the best
    `take` stay. Greedy: an objective that is a sum over heads gets its greatest terms. Order: as chosen.
    Source: arXiv 2506.10978."""
    chosen: list[tuple[int, int]] = []
    left = list(dict.fromkeys(candidates))
    if rounds < 0 or take < 1 or rounds * take > len(left):
        raise ValueError(f"{rounds} rounds of {take} heads, of {len(left)} candidates: want as many at least")
    for _ in range(rounds):
        scores = {head: objective([*chosen, head]) for head in left}
        best = sorted(left, key=lambda head: -scores[head])[:take]
        chosen += best
        left = [head for head in left if head not in best]
    return chosen


def self_heads(model: Any) -> list[tuple[int, int]]:
    """All (layer, head) pairs of the model's self attention."""
    return [
        (site.layer, head)
        for site in choose(model, kind="self")
        for head in range(int(getattr(site.module, "heads", getattr(model.config, "num_attention_heads", 0))))
    ]


@steering(
    "perturbed_guidance",
    title="guided away from itself with heads that look at themselves",
    source="arXiv 2506.10978",
    kinds=("diffusion",),
    neutral={"scale": 0.0},
    strength="scale",
    reach=(0.0, 6.0),
    towers=("patches",),
)
def _open(
    model: Any,
    drawing: Drawing,
    *,
    heads: str | None = None,
    amount: float = 1.0,
    scale: float = 1.0,
    steps: str | None = None,
) -> AbstractContextManager[Rows]:
    active = some_steps("perturbed_guidance", drawing, steps)
    change = perturbed_guidance(model, parse_heads(heads), amount=amount, scale=scale, active=active)
    return drawn_with(change, Rows((drawing.caption,)))
