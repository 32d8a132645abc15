"""DuoAttention: retrieval heads keep everything, streaming heads the sinks and the recent tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyheads.heads.formats import read_gates
from manyheads.shrink.compress import View
from manyheads.shrink.policies.streaming import recency
from manyheads.shrink.policy import Policy

# More than any head will hold.
EVERYTHING = 2**40


@dataclass(kw_only=True)
class Duo(Policy):
    """Claim: only a few KV heads look far back; the others need the attention sinks and the recent tokens alone.

    gates: [layers, KV heads], learned or measured, high for heads that look back. compression_ratio: the share of
    heads, lowest gates first over the whole model, that only keep sink_size + recent_size entries; the others keep all.
    budget_tokens (per head on average) instead: what the streaming heads leave of it is shared by the others, which
    then drop their oldest; half of the heads stream unless streaming says otherwise, and none while all tokens fit.
    Source: arXiv 2410.10819, mit-han-lab/duo-attention; ties there are broken by noise, here by order. Divergence: in
    training streaming heads see only sinks and recent tokens within one prompt as well; in the code that runs them a
    first pass of any length sees all of itself, as here. It makes room after a pass, so that a later token sees
    sink_size + recent_size and itself; here room is made before it, and it is one of the recent ones, as in training.
    """

    gates: list[list[float]] = field(default_factory=list)
    sink_size: int = 64
    recent_size: int = 256
    streaming: float | None = None
    evicts_before: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.gates or len({len(row) for row in self.gates}) != 1 or not self.gates[0]:
            raise ValueError("Duo: gates must be a table [layers, KV heads]; read one with Duo.read_gates(path)")
        for name in ("sink_size", "recent_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"Duo: {name} must be a whole number of at least 0; got {getattr(self, name)!r}")
        if self.streaming is not None and not 0 <= self.streaming <= 1:
            raise ValueError(f"Duo: streaming is a share of the heads, from 0 to 1; got {self.streaming}")
        if self.budget_bytes is not None:
            raise ValueError(
                "Duo: give budget_tokens or compression_ratio; heads that keep everything have no byte budget"
            )
        super().__post_init__()
        given = [own for own in (self.streaming, self.compression_ratio) if own is not None]
        if len(given) > 1:
            raise ValueError(
                f"Duo: compression_ratio={self.compression_ratio} is the share of streaming heads itself; leave out "
                f"streaming={self.streaming}, or give budget_tokens"
            )
        share = given[0] if given else 0.5
        self.full = full_heads(torch.tensor(self.gates, dtype=torch.float64), share)

    @staticmethod
    def read_gates(path: str | Path) -> list[list[float]]:
        """DuoAttention's full_attention_heads.tsv: a row of gates for every layer."""
        return read_gates(path)

    @property
    def smallest(self) -> int:
        return self.sink_size + 1

    def score(self, view: View) -> Tensor:
        return recency(view, self.sink_size)

    def mean_target(self, layer: Any, view: View) -> Tensor:
        if self.compression_ratio is not None:
            return torch.tensor([float(EVERYTHING)], dtype=torch.float64)
        mean = super().mean_target(layer, view)
        return torch.where(view.fed.cpu() <= mean, EVERYTHING, mean)

    def targets(self, mean: Tensor, layer: Any, heads: int) -> Tensor:
        if self.full.shape != (layer.layers, heads):
            raise ValueError(
                f"Duo: gates are for {tuple(self.full.shape)} (layers, KV heads), the model has "
                f"({layer.layers}, {heads}); "
                "use a profile of this model"
            )
        full = self.full[layer.index]
        short = torch.tensor(self.sink_size + self.recent_size, dtype=torch.float64)
        keep = torch.full_like(mean, EVERYTHING)
        if self.compression_ratio is None:
            streams = (~self.full).sum()
            keep = (mean * self.full.numel() - streams * torch.minimum(short, mean)) / self.full.sum().clamp_min(1)
            short = torch.where(mean < EVERYTHING, torch.minimum(short, mean), mean)[:, None]
        return torch.where(full[None], keep[:, None], short).long().clamp_min(self.smallest)

    def room(self, layer: Any) -> int | None:
        return None


def full_heads(gates: Tensor, streaming: float) -> Tensor:
    """[layers, KV heads] bool: all but the given share of lowest gates."""
    order = gates.flatten().argsort(stable=True)
    full = torch.ones(gates.numel(), dtype=torch.bool)
    full[order[: round(gates.numel() * streaming)]] = False
    return full.view(gates.shape)
