"""Handwritten digits in three forms: a grid, patches, and a sequence of pixels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from operator import index
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.tasks.draw import generator
from manyheads.tasks.task import Batch, Task, register_task, whole

SIDE, LEVELS, CLASSES = 8, 17, 10
_EVAL_IN = 5  # one image of so many in each class goes to the evaluation


@dataclass(frozen=True, kw_only=True)
class _Digits(Task):
    """1,797 images of 8x8 pixels with intensities 0..16, as scikit-learn carries them.

    Of each class every fifth image, in the order of the data set, is kept for the evaluation (364 images); the rest
    are gone through in a new random order each epoch. Chance is 0.1.
    """

    head: ClassVar[str] = "image-classification"

    @abstractmethod
    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        """The model's inputs for images [b, 8, 8], whole numbers."""

    def train_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        return self._epochs(batch_size, generator("digits", "train", index(seed)))

    def _epochs(self, batch_size: int, rng: Generator) -> Iterator[Batch]:
        images, labels = split()[0]
        waiting = torch.empty(0, dtype=torch.long)
        while True:
            while len(waiting) < batch_size:
                waiting = torch.cat([waiting, torch.randperm(len(labels), generator=rng)])
            now, waiting = waiting[:batch_size], waiting[batch_size:]
            yield Batch(self._inputs(images[now]), labels[now])

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        images, labels = split()[1]
        parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        return (Batch(self._inputs(some), answers) for some, answers in parts)


@register_task
@dataclass(frozen=True, kw_only=True)
class DigitsGrid(_Digits):
    """Which digit is it? The 8x8 images as a grid of cells, one pixel each, scaled to -1..1. Chance is 0.1."""

    name: ClassVar[str] = "digits-grid"
    title: ClassVar[str] = "Digits as an 8x8 grid"
    pattern: ClassVar[str] = "grid"

    @property
    def n(self) -> int:
        return SIDE * SIDE

    def model_settings(self) -> dict[str, Any]:
        return {"image_size": SIDE, "patch_size": 1, "num_channels": 1, "num_labels": CLASSES}

    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        return scaled(images)


@register_task
@dataclass(frozen=True, kw_only=True)
class DigitsPatches(_Digits):
    """Which digit is it? The 8x8 images as 16 patches of 2x2 pixels, scaled to -1..1. Chance is 0.1."""

    name: ClassVar[str] = "digits-patches"
    title: ClassVar[str] = "Digits as 2x2 patches"
    pattern: ClassVar[str] = "noncausal-self"

    @property
    def n(self) -> int:
        return SIDE * SIDE // 4

    def model_settings(self) -> dict[str, Any]:
        return {"image_size": SIDE, "patch_size": 2, "num_channels": 1, "num_labels": CLASSES}

    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        return scaled(images)


@register_task
@dataclass(frozen=True, kw_only=True)
class DigitsPixels(_Digits):
    """Which digit is it? The 8x8 images as 64 tokens, row by row, each one pixel's intensity. Chance is 0.1."""

    name: ClassVar[str] = "digits-pixels"
    title: ClassVar[str] = "Digits as a sequence of pixels"
    pattern: ClassVar[str] = "noncausal-self"
    head: ClassVar[str] = "sequence-classification"

    @property
    def n(self) -> int:
        return SIDE * SIDE

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": LEVELS, "max_length": SIDE * SIDE, "num_labels": CLASSES}

    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        return {"input_ids": images.flatten(1)}


def scaled(images: Tensor) -> dict[str, Tensor]:
    """Pixel values [b, 1, 8, 8] from -1 to 1."""
    return {"pixel_values": images[:, None].float() / ((LEVELS - 1) / 2) - 1}


@cache
def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images [b, 8, 8], labels [b]) to train on, and to evaluate on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.as_tensor(data.images).long(), torch.as_tensor(data.target).long()
    place = torch.nn.functional.one_hot(labels, CLASSES).cumsum(0).gather(1, labels[:, None])[:, 0] - 1
    kept = place % _EVAL_IN == 0
    return (images[~kept], labels[~kept]), (images[kept], labels[kept])
