"""Forms: names of fields and what stands right of them, read by their boxes on the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator

from manyheads.tasks.draw import distinct, uniform
from manyheads.tasks.task import Batch, Generated, register_task, whole

PAGE = 64  # places each way
LINES, COLUMNS = 8, 2
_HIGH, _WIDE = 6, 28  # of a line, and of a column
MOST_MOVED = 8


@register_task
@dataclass(frozen=True, kw_only=True)
class Forms(Generated):
    """Name the value that stands right of the asked key on a page of `fields` fields.

    Fields stand in two columns of eight lines, in cells drawn at random; a field is a key and, right of it on the same
    line, a value; the whole form is moved by less than `moved` places. Above it stands once more, as wide as the page,
    the key that is asked for. Tokens come in random order, so that only boxes [b, n, 4] (x0, y0, x1, y1, 0 to 63) say
    what stands where. Tokens: keys 0 to keys - 1, values above. Chance is 1 / values; who knows the values and not
    their places is right in about 1 / fields more. A made-up stand-in for the forms of FUNSD.
    """

    name: ClassVar[str] = "forms"
    title: ClassVar[str] = "Forms: the value right of a key"
    pattern: ClassVar[str] = "noncausal-self"
    head: ClassVar[str] = "sequence-classification"
    beside: ClassVar[tuple[str, ...]] = ("boxes",)

    fields: int = 4
    keys: int = 8
    values: int = 8
    moved: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "fields", self.fields, 1, LINES * COLUMNS)
        whole(self, "keys", self.keys, self.fields, 4096, "each field has another key")
        whole(self, "values", self.values, 2, 4096)
        whole(self, "moved", self.moved, 1, MOST_MOVED, "the page ends there; 1 does not move it")

    @property
    def n(self) -> int:
        return 1 + 2 * self.fields

    def model_settings(self) -> dict[str, Any]:
        return {
            "vocab_size": self.keys + self.values,
            "num_labels": self.values,
            "max_length": self.n,
            "max_2d_position_embeddings": PAGE,
        }

    def sample(self, count: int, rng: Generator) -> Batch:
        keys = distinct(count, self.fields, 0, self.keys, rng)
        values = uniform(count, self.fields, 0, self.values, rng)
        asked = uniform(count, 1, 0, self.fields, rng)
        tokens = torch.cat([keys.gather(1, asked), keys, self.keys + values], 1)
        cells = distinct(count, self.fields, 0, LINES * COLUMNS, rng)
        left, top = cells % COLUMNS * _WIDE, (1 + cells // COLUMNS) * _HIGH
        size = [uniform(count, self.fields, 4, 11, rng) for _ in range(2)]
        fields = torch.cat([left, left + 12], 1)
        tops = torch.cat([top, top], 1)
        boxes = torch.stack([fields, tops, fields + torch.cat(size, 1), tops + _HIGH - 2], 2)
        title = torch.tensor([0, 0, 2 * _WIDE - 4, _HIGH - 2]).expand(count, 1, 4)
        moved = uniform(count, 2, 0, self.moved, rng).repeat(1, 2)[:, None]
        boxes = torch.cat([title, boxes], 1) + moved
        order = distinct(count, self.n, 0, self.n, rng)
        inputs = {"input_ids": tokens.gather(1, order), "boxes": boxes.gather(1, order[..., None].expand(-1, -1, 4))}
        return Batch(inputs, values.gather(1, asked)[:, 0])
