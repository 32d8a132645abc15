"""A table of heads: one number [layers, heads] per detector, with what it means; sorted, saved, shown.

A head of a layer that has fewer heads than others, or for which no input told anything, has NaN (JSON: null).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import manyheads
from manyheads.heads.profile import Profile, read_tensors
from manyheads.hosts.fingerprint import fingerprint
from manyheads.runs.files import write_durably
from manyheads.runs.given import parse_json, read_json

FORMAT = "manyheads head table"
SCHEMA = 1
SAFETENSORS, JSON = "detectors.safetensors", "detectors.json"


@dataclass(frozen=True)
class Detector:
    """what: what a score means, in words. threshold: from where on a head counts as found; None: no such line.
    least: the smallest scores come first, not the greatest."""

    name: str
    what: str
    source: str = ""
    threshold: float | None = None
    least: bool = False

    def found(self, value: float) -> bool:
        if self.threshold is None or math.isnan(value):
            return False
        return value <= self.threshold if self.least else value >= self.threshold


@dataclass
class HeadTable:
    """scores: detector -> [layers, heads], float32. settings: detector -> how it was measured."""

    model: str
    stack: str
    layers: int
    heads: int
    scores: dict[str, Tensor] = field(default_factory=dict)
    detectors: dict[str, Detector] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.scores)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.scores:
            raise ValueError(f"the table has no {name!r}; it has {', '.join(self.scores) or 'nothing'}")
        return self.scores[name]

    def add(self, detector: Detector | str, values: Tensor, settings: Mapping[str, Any] | None = None) -> None:
        """A column, [layers, heads]; a string names a detector of the user's own."""
        own = Detector(detector, "") if isinstance(detector, str) else detector
        if tuple(values.shape) != (self.layers, self.heads):
            raise ValueError(
                f"{own.name}: shape {tuple(values.shape)} does not fit {self.layers} layers of {self.heads} heads"
            )
        self.scores[own.name] = values.detach().to("cpu", torch.float32).contiguous()
        self.detectors[own.name] = own
        self.settings[own.name] = dict(settings or {})

    def top(self, name: str, k: int = 5) -> list[tuple[int, int, float]]:
        """(layer, head, score), best first; heads without a score are left out."""
        values = self[name].flatten().tolist()
        sign = 1 if self.detectors[name].least else -1
        order = sorted((i for i, value in enumerate(values) if not math.isnan(value)), key=lambda i: sign * values[i])
        return [(i // self.heads, i % self.heads, values[i]) for i in order[:k]]

    def found(self, name: str, threshold: float | None = None) -> list[tuple[int, int]]:
        """Heads at or beyond the threshold, the detector's own unless given; best first."""
        own = self.detectors[name] if name in self.detectors else Detector(name, "")
        if threshold is not None:
            own = Detector(own.name, own.what, own.source, threshold, own.least)
        if own.threshold is None:
            raise ValueError(f"{name} has no threshold of its own: give one, or ask for top({name!r}, k)")
        return [(layer, head) for layer, head, value in self.top(name, self.layers * self.heads) if own.found(value)]

    def rows(self, sort: str | None = None) -> list[dict[str, Any]]:
        """One dict per head: layer, head, and each score (None where there is none); sorted by a detector."""
        order = [(layer, head) for layer in range(self.layers) for head in range(self.heads)]
        if sort is not None:
            best = [(layer, head) for layer, head, _ in self.top(sort, len(order))]
            order = best + [place for place in order if place not in set(best)]
        columns = {name: _listed(values) for name, values in self.scores.items()}
        return [
            {"layer": layer, "head": head, **{name: own[layer][head] for name, own in columns.items()}}
            for layer, head in order
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**self._head(), "scores": {name: _listed(values) for name, values in self.scores.items()}}

    def profile(self, model: Any) -> Profile:
        """As a profile of `manyheads heads`, which caches and conversions read; of the model that was measured."""
        found = Profile(fingerprint(model, self.model))
        for name, values in self.scores.items():
            found.add(name, values, {**self.settings[name], "detector": self.detectors[name].what})
        return found

    def save(self, folder: str | Path) -> None:
        """detectors.json and detectors.safetensors with the same numbers."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / JSON, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        write_durably(folder / SAFETENSORS, save(self.scores, metadata={"table": json.dumps(self._head())}))

    @classmethod
    def load(cls, path: str | Path) -> HeadTable:
        """path: the folder, or either file."""
        path = Path(path)
        if path.is_dir():
            path = path / SAFETENSORS
        try:
            return cls._read(path)
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: give the folder that HeadTable.save wrote") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a table of heads that can be read ({error}): measure again") from error

    @classmethod
    def _read(cls, path: Path) -> HeadTable:
        if path.suffix == ".json":
            head = read_json(path)
            scores = {
                name: torch.tensor([[math.nan if x is None else x for x in row] for row in values])
                for name, values in head["scores"].items()
            }
        else:
            metadata, scores = read_tensors(path)
            head = parse_json(metadata["table"], "its metadata")
        if head["format"] != FORMAT or head["schema"] != SCHEMA:
            raise ValueError(f"it holds {head['format']!r}, schema {head['schema']!r}")
        found = cls(head["model"], head["stack"], head["layers"], head["heads"])
        for name in head["detectors"]:
            found.add(Detector(name, **head["detectors"][name]), scores[name], head["settings"][name])
        return found

    def _head(self) -> dict[str, Any]:
        kept = {name: {k: v for k, v in asdict(own).items() if k != "name"} for name, own in self.detectors.items()}
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "manyheads": manyheads.__version__,
            "indexing": "Layers and heads count from 0; scores are [layers, query heads].",
            "model": self.model,
            "stack": self.stack,
            "layers": self.layers,
            "heads": self.heads,
            "detectors": kept,
            "settings": self.settings,
        }


def _listed(values: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in values.tolist()]
