"""Cells: the smallest pieces of a run that are measured, stored and resumed on their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import manyheads
from manyheads.runs.results import SCHEMA


@dataclass(frozen=True)
class Cell:
    """kind: quality, speed, memory or decode. mechanism: its label. place: the columns that say which cell this is.
    settings: everything that the outcome depends on, as JSON values: what the worker is given. chain: cells of one
    chain run in order, and where one takes too long the rest is not tried; '' for a cell that stands by itself.
    undeclared: why it cannot be run."""

    kind: str
    mechanism: str
    place: Mapping[str, Any]
    settings: Mapping[str, Any]
    chain: str
    undeclared: str = ""
    key: str = field(init=False)

    def __post_init__(self) -> None:
        facts = {"schema": SCHEMA, "manyheads": manyheads.__version__, "kind": self.kind, **self.settings}
        text = json.dumps(facts, sort_keys=True, default=str)
        object.__setattr__(self, "key", f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}")

    @property
    def row(self) -> dict[str, Any]:
        """The columns that every outcome of this cell carries."""
        return {"kind": self.kind, "mechanism": self.mechanism, **self.place}

    @property
    def title(self) -> str:
        words = {"task": "", "learning_rate": "lr ", "pattern": ""}
        place = [f"{words.get(key, key + ' ')}{value}" for key, value in self.place.items() if key != "causal"]
        return ", ".join([f"{self.kind} of {self.mechanism}", *place])


def same_here(cell: Cell, made: Iterable[Cell]) -> Cell:
    """Of the cells that this machine makes of the same command, the one that is `cell`. ValueError where none is: a
    figure of another model or text, or by other code, would be stored under this one's name."""
    for own in made:
        if own.key == cell.key:
            return own
    raise ValueError(
        f"this worker makes another cell of {cell.title}: its model, text or sources are not those of the machine that "
        "asked; give both the same files"
    )
