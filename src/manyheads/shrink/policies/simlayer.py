"""SimLayerKV: layers that look at the beginning and the end alone keep no more than that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.policies.streaming import recency
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import whole_number

# More than any head will hold.
EVERYTHING = 2**40


@dataclass(kw_only=True)
class SimLayerKV(Policy):
    """Claim: some layers are lazy, and can be told by one look.

    A layer is lazy for a row if its last_size latest queries, averaged over all heads, give the first sink_size tokens
    and the recent_size before these queries more than lazy_threshold of their attention. It then keeps the first
    sink_size and the latest recent_size - last_size; other layers keep everything. Prompts of at most sink_size +
    recent_size + last_size tokens are left alone; lazy_threshold=1 drops nothing. A prompt is judged once; when="both":
    lazy layers keep to that while decoding. What is saved is the threshold's to say, so that there is no budget.
    Source: arXiv 2410.13846, sail-sg/SimLayerKV, NVIDIA/kvpress `simlayerkv_press.py`, which decides for a batch at
    once. Thresholds told there: Llama-3 0.9, Mistral 0.8, Qwen 0.85, Llama-2 0.65.
    """

    lazy_threshold: float = 1.0
    sink_size: int = 4
    recent_size: int = 1024
    last_size: int = 1
    when: str = "prefill"

    def __post_init__(self) -> None:
        if not 0 <= self.lazy_threshold <= 1:
            raise ValueError(f"SimLayerKV: lazy_threshold is a share of attention, 0 to 1; got {self.lazy_threshold!r}")
        for name, least in (("sink_size", 0), ("recent_size", 1), ("last_size", 1)):
            whole_number("SimLayerKV", name, getattr(self, name), least)
        if self.last_size >= self.recent_size + self.sink_size:
            raise ValueError(
                f"SimLayerKV: last_size={self.last_size} queries look at sink_size + recent_size = "
                f"{self.sink_size + self.recent_size} tokens; give fewer of them"
            )
        budgets = ("compression_ratio", "budget_tokens", "budget_bytes", "allocation")
        given = [key for key in budgets if getattr(self, key) is not None]
        if given:
            raise ValueError(f"SimLayerKV: lazy_threshold says what is dropped; leave {', '.join(given)} out")
        if self.when == "decode":
            raise ValueError("SimLayerKV judges layers at the prompt: when='decode' is not possible; use 'both'")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return self.sink_size + self.recent_size - self.last_size

    @property
    def is_full(self) -> bool:
        return self.lazy_threshold == 1

    def score(self, view: View) -> Tensor:
        return recency(view, self.sink_size)

    def mean_target(self, layer: Any, view: View) -> Tensor:
        if "lazy" not in layer.memo:
            long = view.count > self.sink_size + self.recent_size + self.last_size
            if not bool(long.any()):
                return torch.full((1,), EVERYTHING, dtype=torch.float64)
            layer.memo["lazy"] = self._share(view) > self.lazy_threshold
            layer.memo["lazy"] &= long
        return torch.where(layer.memo["lazy"].cpu(), self.smallest, EVERYTHING).double()

    def _share(self, view: View) -> Tensor:
        """[b]: of the latest queries' attention, what goes to both ends of what stands before them."""
        before = view.count[:, None, None] - self.last_size - view.positions
        ends = (before > 0) & ((view.positions < self.sink_size) | (before <= self.recent_size))
        total, asked = torch.zeros((), device=ends.device), torch.zeros((), device=ends.device)
        for block, real in view.weights(last=self.last_size):
            total = total + (block * real * ends[:, :, None, None]).sum(-1).mean((1, 2)).sum(-1)
            asked = asked + real.sum((1, 2, 3, 4))
        return (total / asked.clamp_min(1)).expand(view.keys.shape[0]).clone()
