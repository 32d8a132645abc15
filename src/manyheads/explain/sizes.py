"""What an explanation measures besides its one text: chosen by what a pass over that text took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.device import device_of
from manyheads.runs.sizes import chosen_note, clock_of, first_within

# Tokens and samples of each kind that detectors read: everything first.
SAMPLES = ((256, 4), (256, 2), (128, 2), (128, 1))
# Steps of a deletion curve, and tokens that are left out one by one to rank them (None: all).
CURVES: tuple[tuple[int, int | None], ...] = (
    (10, None), (5, None), (5, 32), (5, 16), (3, 16), (3, 8), (2, 8), (0, None),
)  # fmt: skip
# Seconds that the samples and the curves may take.
ROOM = (6.0, 12.0)
# Reading the weights once takes a core as long as about so many tokens.
_READ = 20


@dataclass(frozen=True)
class Sizes:
    """samples: (tokens, count) of detectors. steps: of the curves that tell how faithful a method is; 0: not told.
    ranked: tokens over which its ranks are correlated; None: all. seconds: of the views, the attributions and the
    detectors, about. note: what was chosen, if it is not all."""

    samples: tuple[int, int] = SAMPLES[0]
    steps: int = CURVES[0][0]
    ranked: int | None = None
    seconds: tuple[float, float, float] = (3.0, 4.0, 2.0)
    note: str = ""

    def share(self, parts: int) -> float:
        """Of the whole, when so many parts are done."""
        return sum(self.seconds[:parts]) / sum(self.seconds)


@torch.no_grad()
def read(model: Any, inputs: dict[str, Tensor], clock: Callable[[], float] | None = None) -> tuple[Any, float]:
    """The model's output, and what a pass takes in seconds: of two where they are short, since the first warms up."""
    clock = clock or clock_of(device_of(model))
    began = clock()
    output = model(**inputs)
    took = clock() - began
    if took < 2.0:
        began = clock()
        output = model(**inputs)
        took = min(took, clock() - began)
    return output, took


def choose(
    took: float, n: int, methods: int, *, thorough: bool, faithful: bool, detectors: bool, causal: bool
) -> Sizes:
    """took: seconds of a pass over n tokens. faithful, detectors: whether these are asked for at all. causal: masked
    tokens are left out, so that a curve costs half."""
    token = max(took, 1e-9) / (n + _READ)

    def curves(own: tuple[int, int | None]) -> float:
        steps, ranked = own
        if not steps:
            return 0.0
        return (
            token
            * n
            * (min(n, n if ranked is None else ranked + 1) + 2 * methods * (steps - 1) * (0.5 if causal else 1.0))
        )

    def sampled(own: tuple[int, int]) -> float:
        return 4.5 * token * (own[0] + _READ) * own[1]

    chosen = CURVES[0] if thorough else first_within(CURVES, curves, ROOM[1])
    steps, ranked = chosen
    samples = SAMPLES[0] if thorough else first_within(SAMPLES, sampled, ROOM[0])
    attributed = 2 * methods * took + (curves(chosen) if faithful else 0.0)
    seconds = (6 * took, attributed, sampled(samples) if detectors else 0.0)
    said = []
    if faithful and chosen != CURVES[0]:
        over = "" if ranked is None or ranked >= n - 1 else f", its ranks over {ranked} of {n} tokens drawn by chance"
        said.append(f"faithfulness in {steps} steps{over}" if steps else "faithfulness not measured")
    if detectors and samples != SAMPLES[0]:
        counted = "1 sample" if samples[1] == 1 else f"{samples[1]} samples"
        said.append(f"head detectors on {counted} of {samples[0]} tokens of a kind")
    return Sizes(samples, steps, ranked, seconds, chosen_note(", ".join(said), sum(seconds)) if said else "")


def that_fit(calls: Sequence[Any], budget_mb: float) -> list[Any]:
    """Layers, evenly spaced, whose queries and keys take no more than half of a neuron view's room; at least one."""
    query, key = calls[0].query, calls[0].key
    # Two bytes a number, four characters for three bytes; keys are shown for every query head.
    each = query.shape[1] * (query.shape[2] + key.shape[2]) * query.shape[3] * 2 * 4 / 3 / 1e6
    count = max(1, min(len(calls), int(budget_mb / 2 / each)))
    if count == len(calls):
        return list(calls)
    return [calls[i * (len(calls) - 1) // max(1, count - 1)] for i in range(count)]
