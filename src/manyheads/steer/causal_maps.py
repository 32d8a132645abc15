"""CausalMM: what the answer owes to where the model looks, by attention that looks elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import tap
from manyheads.steer.beside import beside, plausible
from manyheads.steer.common import check_share
from manyheads.steer.method import Prompt, steering

KINDS = ("random", "uniform", "reversed", "shuffle")


@contextmanager
def causal_maps(
    model: Any,
    gamma: float = 0.5,
    *,
    vision: str | None = "uniform",
    language: str | None = None,
    eps: float = 0.1,
    seed: int = 0,
) -> Iterator[None]:
    """Claim: the modality prior is a confounder; the answer minus the answer under do(attention = another map) is what
    the attention itself brings.

    z' = z + gamma sum_r (z - z_r) over the runs r that are asked for: one whose vision tower attends by another map,
    one whose text stack does; tokens with z < log(eps) + max z are out. With both: (1 + 2 gamma) z - gamma z_v -
    gamma z_l. gamma 0 and eps 0 change nothing; maps are those of `counterfactual`.
    Source: arXiv 2410.04780, The-Martyr/CausalMM. This is the paper's do(A): A' V inside the layers. The released code
    runs no attention again: it resizes the map of n x n tokens to one weight per patch, and multiplies features by it.
    """
    kinds = [("vision", vision), ("language", language)]
    wrong = [kind for _, kind in kinds if kind is not None and kind not in KINDS]
    if wrong:
        raise ValueError(f"causal_maps: no map {wrong[0]!r}; want one of {', '.join(KINDS)}, or None")
    check_share("causal_maps: eps", eps)
    if not gamma >= 0:
        raise ValueError(f"causal_maps: gamma must be at least 0; got {gamma}")
    asked = [(where, kind) for where, kind in kinds if kind is not None]
    if not asked:
        raise ValueError("causal_maps: say a map for the vision tower, the text, or both")
    if gamma == 0 and eps == 0:
        yield
        return

    def run_of(where: str, kind: str) -> Any:
        def run(named: dict[str, Any]) -> tuple[dict[str, Any], AbstractContextManager[Any]]:
            stack = text_stack(model) if where == "language" else where
            return named, counterfactual(model, kind, stack=stack, seed=seed)

        return run

    def combine(own: Tensor, others: Sequence[Tensor]) -> Tensor:
        mixed = own
        for other in others:
            mixed = mixed + gamma * (own - other)
        return plausible(mixed, own, eps)

    with beside(model, [run_of(*each) for each in asked] if gamma else [], combine, "causal_maps"):
        yield


@contextmanager
def counterfactual(model: Any, kind: str, *, stack: str | None = None, seed: int = 0) -> Iterator[None]:
    """do(A = A') in all layers of a stack, A' made of the head's own map A: "random", 2 U(0, 1); "uniform", its mean;
    "reversed", its greatest entry minus A; "shuffle", its entries in another order, the same for every row of the
    batch. Rows are not made to sum to 1 again. Where every query sees every key, maxima, means and orders are of the
    whole map, as published; else of each row over what it sees, so that decoding is the same as reading at once, and
    "shuffle" is refused. Random numbers depend on the seed, the layer and the place alone."""
    if kind not in KINDS:
        raise ValueError(f"counterfactual: no map {kind!r}; want one of {', '.join(KINDS)}")

    def reader(call: Any) -> Tensor:
        own = opened(call, "counterfactual")
        whole = own.allowed(slice(None)) is None and own.query.shape[2] > 1
        return _whole(own, kind, seed) if whole else _by_row(own, kind, seed)

    with tap(model, reader, stack=stack, kind="self"):
        yield


def _whole(call: AttentionCall, kind: str, seed: int) -> Tensor:
    """Of maps that hide nothing: pictures', small enough to be made at once."""
    weights = call.weights()
    b, h, n, m = weights.shape
    generator = torch.Generator().manual_seed(seed * 10_007 + call.layer)
    if kind == "random":
        changed = 2 * torch.rand(b, h, n, m, generator=generator).to(weights)
    elif kind == "uniform":
        changed = weights.mean((-2, -1), keepdim=True).expand_as(weights)
    elif kind == "reversed":
        changed = weights.amax((-2, -1), keepdim=True) - weights
    else:
        order = torch.stack([torch.randperm(n * m, generator=generator) for _ in range(h)]).to(weights.device)
        changed = weights.flatten(2).gather(2, order.expand(b, h, n * m)).view_as(weights)
    return call.mix(lambda _, rows: changed[:, :, rows])


def _by_row(call: AttentionCall, kind: str, seed: int) -> Tensor:
    if kind == "shuffle":
        raise ValueError("counterfactual: a shuffled map would show words what comes after them: want another kind")
    n, m = call.query.shape[2], call.key.shape[2]

    def edit(weights: Tensor, rows: slice) -> Tensor:
        seen = call.visible(rows)
        seen = torch.ones_like(weights, dtype=torch.bool) if seen is None else seen.expand_as(weights)
        if kind == "uniform":
            changed = weights.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
        elif kind == "reversed":
            changed = weights.amax(-1, keepdim=True) - weights
        else:
            places = range(m - n + rows.start, m - n + rows.stop)
            changed = 2 * torch.stack([_drawn(seed, call.layer, place, m) for place in places]).to(weights)
        return torch.where(seen, changed, 0.0)

    return call.mix(edit)


def _drawn(seed: int, layer: int, place: int, count: int) -> Tensor:
    """As many numbers as keys, the same however many keys there are behind them."""
    generator = torch.Generator().manual_seed((seed * 10_007 + layer) * 1_000_003 + place)
    return torch.rand(count, generator=generator)


@steering(
    "causal_maps",
    title="the answer minus what it is when attention looks elsewhere",
    source="arXiv 2410.04780",
    kinds=("vision-language",),
    neutral={"gamma": 0.0, "eps": 0.0},
    strength="gamma",
    reach=(0.0, 1.0),
    towers=(
        "image",
        "text",
        "logits",
    ),
)
def _open(
    model: Any,
    prompt: Prompt,
    *,
    gamma: float = 0.5,
    vision: str = "uniform",
    language: str = "",
    eps: float = 0.1,
    seed: int = 0,
) -> AbstractContextManager[None]:
    return causal_maps(model, gamma, vision=vision or None, language=language or None, eps=eps, seed=seed)
