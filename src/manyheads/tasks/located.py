"""Digits among distractors, to be found: a set of boxes with the digit in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.functional.box_sets import matched_overlap, set_loss
from manyheads.tasks.cluttered import CANVAS, GLYPH, _Canvas, _paste
from manyheads.tasks.task import Batch, register_task, whole

_NONE = -1.0


@register_task
@dataclass(frozen=True, kw_only=True)
class Locate(_Canvas):
    """Where are the digits, and which? One to `digits` of them among distractors, as in `counted`.

    A digit's box is the smallest around its lit pixels. Targets are [b, digits, 5]: class, and middle x, middle y,
    width, height in parts of the canvas; class -1 where there are fewer. Scored is the overlap (IoU) of boxes found
    with true ones of their class, in the best assignment, by the number of those found or there, whichever is more: 1
    for all of them, exact, and nothing else; 0 for an empty answer. The loss is DETR's, arXiv:2005.12872.
    """

    name: ClassVar[str] = "locate"
    title: ClassVar[str] = "Digits among distractors, as a set of boxes"
    head: ClassVar[str] = "object-detection"
    metric: ClassVar[str] = "matched overlap"
    digits: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "digits", self.digits, 1, 9)

    def model_settings(self) -> dict[str, Any]:
        return {**super().model_settings(), "num_queries": 4 * self.digits}

    def _draw(self, count: int, images: Tensor, labels: Tensor, rng: Generator) -> Batch:
        canvas = self._strewn(count, images, rng)
        many = torch.randint(1, self.digits + 1, (count,), generator=rng)
        targets = torch.zeros(count, self.digits, 5)
        for number, corner in enumerate(self._apart(count, self.digits, rng)):
            which = torch.randint(len(images), (count,), generator=rng)
            _paste(canvas, images[which], corner, only=number < many)
            targets[:, number, 0] = torch.where(number < many, labels[which], _NONE)
            targets[:, number, 1:] = _boxes(images[which], corner)
        return Batch({"pixel_values": 2 * canvas[:, None] - 1}, targets)

    def answered(self, output: Any) -> Tensor:
        return torch.cat([output.logits.float(), output.pred_boxes.float()], -1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return set_loss(*self._sets(logits, targets))

    def score(self, logits: Tensor, targets: Tensor) -> tuple[float, int]:
        total, count = matched_overlap(*self._sets(logits, targets))
        return float(total.sum()), int(count.sum())

    def _sets(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if logits.shape[0] != targets.shape[0] or logits.shape[2:] != (self.classes + 5,):
            raise ValueError(
                f"locate: answers {list(logits.shape)} to targets {list(targets.shape)}; want {self.classes + 1} "
                "logits and 4 numbers of a box for each query"
            )
        return logits[..., :-4], logits[..., -4:], targets[..., 0].long(), targets[..., 1:]


def _boxes(glyphs: Tensor, corner: Tensor) -> Tensor:
    """glyphs [b, s, s] at corners [b, 2] (row, column) -> [b, 4]."""
    ends = []
    for axis in (1, 2):
        lit = glyphs.amax(3 - axis) > 0
        start, behind = lit.int().argmax(1), GLYPH - lit.flip(1).int().argmax(1)
        ends.append(torch.stack([start, behind], 1) + corner[:, axis - 1, None])
    down, along = ends
    middle = torch.stack([along.sum(1), down.sum(1)], 1) / 2
    size = torch.stack([along[:, 1] - along[:, 0], down[:, 1] - down[:, 0]], 1)
    return torch.cat([middle, size], 1) / CANVAS
