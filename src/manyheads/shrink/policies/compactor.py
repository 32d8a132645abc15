"""Compactor: outliers among keys, and tokens that are asked for from both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.outliers import find_angles, leverage, note_both_ways, pooled, standard
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import TextOrder, one_text, whole_number


@dataclass(kw_only=True)
class Compactor(Policy):
    """Claim: leverage of keys and non-causal attention together choose well with no question known.

    score(t) = blending z(Leverage) + z(NonCausal), [b, g, m], both over the tokens between the first sink_size and the
    last recent_size, which stay; z: in units of a layer's deviation, over its heads. blending=None: the share that is
    dropped. Source: arXiv 2507.08143, NVIDIA/kvpress `compactor_press.py`, of whose parts `Leverage` and `NonCausal`
    tell; its z counts a batch together, here each row for itself.
    """

    sink_size: int = 8
    recent_size: int = 4
    chunk_size: int = 256
    sketch_dimension: int | None = 48
    blending: float | None = None
    seed: int = 0
    rotary: bool = True
    when: str = "prefill"
    notes: ClassVar[tuple[str, ...]] = ("asked",)

    def __post_init__(self) -> None:
        for name, least in (("sink_size", 0), ("recent_size", 0), ("chunk_size", 1)):
            whole_number("Compactor", name, getattr(self, name), least)
        if self.sketch_dimension is not None:
            whole_number("Compactor", "sketch_dimension", self.sketch_dimension, 1)
        if self.blending is not None and not 0 <= self.blending < torch.inf:
            raise ValueError(f"Compactor: blending weighs leverage, at least 0; got {self.blending!r}")
        if self.when != "prefill":
            raise ValueError(f"Compactor compares a prompt's tokens: when={self.when!r} is not possible; use KeyDiff")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return self.sink_size + self.recent_size + 1

    def prepare(self, model: Any, cache: Any) -> None:
        if self.rotary and not self.is_full:
            find_angles("Compactor", model, cache)

    def observe(self, view: View) -> None:
        note_both_ways(view, "asked", self.chunk_size, self.sink_size, self.recent_size)

    def score(self, view: View) -> Tensor:
        one_text(view, "Compactor")
        recent = view.positions >= view.count[:, None, None] - self.recent_size
        counted = view.alive & (view.positions >= self.sink_size) & ~recent
        outlying = standard(leverage(view, counted, self.sketch_dimension, self.seed), counted)
        asked = standard(pooled(view, TextOrder.of(view), view.note("asked"), counted), counted)
        return (self._blending(view) * outlying + asked).masked_fill(~counted, torch.inf)

    def _blending(self, view: View) -> Tensor | float:
        if self.blending is not None:
            return self.blending
        if isinstance(self.compression_ratio, (int, float)):
            return self.compression_ratio
        assert view.targets is not None
        return (1 - view.targets / view.count[:, None].clamp_min(1)).clamp_min(0)[..., None]
