"""Leverage scores: keys that no mixture of the others could stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.outliers import find_angles, leverage
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import one_text, whole_number


@dataclass(kw_only=True)
class Leverage(Policy):
    """Claim: tokens whose keys, before rotation, are statistical outliers are those that a later query may single out.

    score(t) = x_t (X'X + 0.01)^-1 x_t', [b, g, m]; X the entries' keys turned back to position 0, less their mean,
    times a Gaussian [d, sketch_dimension] of this seed (None: the keys themselves, exactly).
    Source: the leverage part of Compactor, arXiv 2507.08143, NVIDIA/kvpress `leverage_press.py` (Cholesky; the official
    code by SVD in chunks of 512), which draws another sketch at every call; here a layer has one. In float64.
    rotary=False takes keys as they are, for models without rotary positions.
    """

    sketch_dimension: int | None = 48
    seed: int = 0
    rotary: bool = True
    when: str = "prefill"

    def __post_init__(self) -> None:
        if self.sketch_dimension is not None:
            whole_number("Leverage", "sketch_dimension", self.sketch_dimension, 1)
        super().__post_init__()

    def prepare(self, model: Any, cache: Any) -> None:
        if self.rotary and not self.is_full:
            find_angles("Leverage", model, cache)

    def score(self, view: View) -> Tensor:
        one_text(view, "Leverage")
        return leverage(view, view.alive, self.sketch_dimension, self.seed)
