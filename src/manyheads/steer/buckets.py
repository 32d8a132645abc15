"""Attention Buckets: several rotary bases, one answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.steer.beside import beside
from manyheads.steer.method import Prompt, steering


@contextmanager
def buckets(model: Any, bases: Sequence[float]) -> Iterator[None]:
    """Claim: a rotary base leaves troughs of attention at certain distances; runs with other bases see into them.

    One run per base B_j; p = sum_j w_j p_j with w_j = max_v p_j(v) / sum_k max_v p_k(v), at every position; the logits
    that come back are log p. Each run has its own cache. bases equal to the model's own: one run, nothing changes.
    Source: arXiv 2312.04455, which searches the bases; no code was found. Costs as many runs as there are bases.
    """
    rotary = _rotary(model)
    if not bases or any(base <= 1 for base in bases):
        raise ValueError(f"buckets: bases must be numbers above 1, such as 1e4; got {list(bases)}")
    own = rotary.inv_freq
    half, base = own.numel(), _base(own)
    angles = [own if abs(b / base - 1) < 1e-3 else _angles(b, half).to(own) for b in bases]
    if all(found is own for found in angles):
        yield
        return
    # Of the model's own base, if it is among them, a run is the model's own.
    main = next((angle for angle in angles if angle is own), angles[0])
    others = [angle for angle in angles if angle is not main]

    @contextmanager
    def turned(angle: Tensor) -> Iterator[None]:
        rotary.inv_freq = angle
        try:
            yield
        finally:
            rotary.inv_freq = own

    def run_of(angle: Tensor) -> Any:
        return lambda named: (named, turned(angle))

    with beside(
        model,
        [run_of(angle) for angle in others],
        lambda logits, rest: mixed([logits, *rest]),
        "buckets",
        lambda: turned(main),
    ):
        yield


def _rotary(model: Any) -> Any:
    found = [module for module in model.modules() if hasattr(module, "rope_type") and hasattr(module, "inv_freq")]
    if len(found) != 1 or found[0].rope_type != "default" or not isinstance(found[0].inv_freq, Tensor):
        raise ValueError(f"{type(model).__name__} has no single plain rotary embedding whose base could be changed")
    return found[0]


def _base(angles: Tensor) -> float:
    half = angles.numel()
    return float(angles[1].double().pow(-half)) if half > 1 else float("nan")


def mixed(logits: Sequence[Tensor]) -> Tensor:
    """log of the mean of distributions [..., v], each weighted by its greatest probability."""
    each = torch.stack([one.float().log_softmax(-1) for one in logits])
    weights = each.amax(-1, keepdim=True).log_softmax(0)
    return (each + weights).logsumexp(0)


def _angles(base: float, half: int) -> Tensor:
    return base ** -(torch.arange(half, dtype=torch.float64) / half)


@steering(
    "buckets",
    title="several rotary bases, one answer",
    source="arXiv 2312.04455",
    kinds=("language",),
    neutral={"widest": 1.0},
    strength="widest",
    reach=(1.0, 4.0),
)
def _open(model: Any, prompt: Prompt, *, widest: float = 2.5, count: int = 3) -> AbstractContextManager[None]:
    """count bases, from the model's own to `widest` times it (the paper's go from 10,000 to 25,000)."""
    if count < 2 or not widest > 0:
        raise ValueError(f"buckets: count={count}, widest={widest:g}; want 2 bases or more, and a widest above 0")
    own = _base(_rotary(model).inv_freq)
    return buckets(model, [own * (1 + (widest - 1) * i / (count - 1)) for i in range(count)])
