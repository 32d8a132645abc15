"""Stand-ins for tasks of CAB whose corpora cannot be generated: forecasting, and super-resolution of digits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from manyheads.tasks.digits import LEVELS, SIDE, _Digits
from manyheads.tasks.task import MAX_LENGTH, Batch, Generated, register_task, whole

_WAVES, _REACH = 3, 2.5


def _squared_error(logits: Tensor, targets: Tensor, step: float) -> tuple[float, int]:
    """Of the level expected under the logits [k, levels], `step` apart, against the true one [k]; summed, and k."""
    levels = torch.arange(logits.shape[-1], dtype=torch.float64)
    expected = (logits.double().softmax(-1) * levels.to(logits.device)).sum(-1)
    return float(((expected - targets) * step).square().sum()), len(targets)


@register_task
@dataclass(frozen=True, kw_only=True)
class Forecast(Generated):
    """The encoder reads n values of a series, the decoder names the next `horizon` at once. Scored in squared error.

    A series is the sum of three sinusoids of random periods (8 to 64), phases and amplitudes (0.2 to 0.8), with normal
    noise on top, cut into `levels` equal steps from -2.5 to 2.5: tokens 0..levels-1. The decoder reads a query token
    for each place, so it need not be causal; the error is that of the value expected under its distribution. To answer
    0 always has an error near 0.41. Source: stands in for long sequence time-series forecasting, of the noncausal cross
    pattern of CAB, arXiv:2210.07661, whose series (electricity, weather) do not ship: no figure compares with theirs.
    """

    name: ClassVar[str] = "forecast"
    title: ClassVar[str] = "Forecasting (sums of sinusoids)"
    pattern: ClassVar[str] = "noncausal-cross"
    head: ClassVar[str] = "seq2seq-lm"
    metric: ClassVar[str] = "squared error"
    higher_is_better: ClassVar[bool] = False

    n: int = 96
    horizon: int = 24
    levels: int = 64
    noise: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "n", self.n, 2, MAX_LENGTH)
        whole(self, "horizon", self.horizon, 1, self.n, f"no more than is read, n={self.n}")
        whole(self, "levels", self.levels, 4, 65_536)
        numeric = isinstance(self.noise, int | float) and not isinstance(self.noise, bool)
        if not numeric or not math.isfinite(self.noise) or not 0 <= self.noise <= 1:
            raise ValueError(f"forecast: noise={self.noise!r}; want a number from 0 to 1")

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": self.levels + 1, "max_length": self.n, "decoder_causal": False}

    @property
    def step(self) -> float:
        """Between two levels."""
        return 2 * _REACH / self.levels

    def sample(self, count: int, rng: Generator) -> Batch:
        time = torch.arange(self.n + self.horizon)
        period = 8.0 * 8.0 ** torch.rand(count, _WAVES, 1, generator=rng)
        phase = torch.rand(count, _WAVES, 1, generator=rng)
        height = 0.2 + 0.6 * torch.rand(count, _WAVES, 1, generator=rng)
        series = (height * (2 * math.pi * (time / period + phase)).sin()).sum(1)
        series += self.noise * torch.randn(series.shape, generator=rng)
        tokens = ((series + _REACH) / self.step).floor().long().clamp(0, self.levels - 1)
        queries = torch.full((count, self.horizon), self.levels)
        return Batch(
            {"input_ids": tokens[:, : self.n].contiguous(), "decoder_input_ids": queries},
            tokens[:, self.n :].contiguous(),
        )

    def score(self, logits: Tensor, targets: Tensor) -> tuple[float, int]:
        logits, targets = self.asked(logits, targets)
        return _squared_error(logits[:, : self.levels], targets, self.step)


@register_task
@dataclass(frozen=True, kw_only=True)
class SuperResolution(_Digits):
    """Digits of 4 x 4 pixels, each the mean of four, are read; the 8 x 8 pixels are asked for. Scored in squared error.

    The input is the small image with each pixel repeated, from -1 to 1, one token a pixel; a class for each of the 17
    intensities is predicted at each, and the error, in units of the whole range, is that of the intensity expected. To
    repeat the input has an error near 0.05. Source: stands in for super-resolution of faces, of the noncausal
    self pattern of CAB, arXiv:2210.07661 (8 times larger, by SR3): no figure compares with theirs.
    """

    name: ClassVar[str] = "super-resolution"
    title: ClassVar[str] = "Super-resolution of digits"
    pattern: ClassVar[str] = "noncausal-self"
    head: ClassVar[str] = "semantic-segmentation"
    metric: ClassVar[str] = "squared error"
    higher_is_better: ClassVar[bool] = False

    @property
    def n(self) -> int:
        return SIDE * SIDE

    def model_settings(self) -> dict[str, Any]:
        return {"image_size": SIDE, "patch_size": 1, "num_channels": 1, "num_labels": LEVELS}

    def train_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        return (self._with_pixels(batch) for batch in super().train_batches(batch_size, seed))

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        return (self._with_pixels(batch) for batch in super().eval_batches(batch_size))

    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": images[:, None].float()}

    def _with_pixels(self, batch: Batch) -> Batch:
        sharp = batch.inputs["pixel_values"]
        small = F.avg_pool2d(sharp, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return Batch({"pixel_values": small / ((LEVELS - 1) / 2) - 1}, sharp[:, 0].long())

    def aligned(self, logits: Tensor) -> Tensor:
        return logits.movedim(1, -1)

    def score(self, logits: Tensor, targets: Tensor) -> tuple[float, int]:
        return _squared_error(*self.asked(logits, targets), 1 / (LEVELS - 1))
