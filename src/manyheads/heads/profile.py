"""A head profile: scores per layer and head, of one model, in safetensors with a JSON of the same numbers beside it.

Nothing is unpickled, and a profile says which weights it was measured on, so that another model's is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import manyheads
from manyheads.hosts.fingerprint import Fingerprint, fingerprint
from manyheads.runs.files import write_durably
from manyheads.runs.given import parse_json, read_json

FORMAT = "manyheads head profile"
SCHEMA = 1
SAFETENSORS, JSON = "heads.safetensors", "heads.json"
INDEXING = (
    "Layers and heads count from 0. Scores are [layers, query heads]; gates are [layers, KV heads]; influence is "
    "[spans, lengths, layers, query heads]; query head h reads KV head h // (heads / kv_heads)."
)


@dataclass
class Profile:
    """scores: measure -> tensor (see INDEXING). settings: measure -> how it was measured."""

    model: Fingerprint
    scores: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, measure: str, values: Tensor, settings: Mapping[str, Any]) -> None:
        heads = self.model.kv_heads if measure == "gates" else self.model.heads
        if tuple(values.shape[-2:]) != (self.model.layers, heads):
            raise ValueError(
                f"{measure} of shape {tuple(values.shape)} does not fit {self.model.layers} layers of {heads} heads"
            )
        self.scores[measure] = values.detach().to("cpu", torch.float32).contiguous()
        self.settings[measure] = dict(settings)

    def top(self, measure: str, count: int = 5) -> list[tuple[int, int, float]]:
        """(layer, head, score), best first. Influence: the mean over lengths, of the first span."""
        values = self.scores[measure]
        if values.dim() == 4:
            values = values[0].mean(0)
        best = values.flatten().sort(descending=True, stable=True).indices[:count]
        return [(int(i) // values.shape[1], int(i) % values.shape[1], float(values.flatten()[i])) for i in best]

    def as_dict(self) -> dict[str, Any]:
        return {
            **self._head(),
            "scores": {name: values.tolist() for name, values in self.scores.items()},
        }

    def save(self, folder: str | Path) -> None:
        """Both files, each written whole or not at all; the safetensors last, since that is the one that is read."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / JSON, (json.dumps(self.as_dict(), indent=1) + "\n").encode())
        write_durably(folder / SAFETENSORS, save(self.scores, metadata={"profile": json.dumps(self._head())}))

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Profile:
        """path: the folder, or either file. model: refuse a profile that was measured on another."""
        found = cls._read(Path(path))
        if model is not None:
            found.check(fingerprint(model, type(model).__name__), path)
        return found

    def check(self, model: Fingerprint, where: str | Path = "the profile") -> None:
        differences = self.model.differences(model)
        if differences:
            raise ValueError(
                f"{where} is a head profile of another model ({self.model.name}): {'; '.join(differences)}. "
                "Measure this one with `manyheads heads`, in a folder of its own"
            )

    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "manyheads": manyheads.__version__,
            "indexing": INDEXING,
            "model": asdict(self.model),
            "settings": self.settings,
        }

    @classmethod
    def _read(cls, path: Path) -> Profile:
        if path.is_dir():
            path = path / (SAFETENSORS if (path / SAFETENSORS).exists() or not (path / JSON).exists() else JSON)
        try:
            head, scores = _from_json(path) if path.suffix == ".json" else _from_safetensors(path)
            if head["format"] != FORMAT or head["schema"] != SCHEMA:
                raise ValueError(f"it holds {head['format']!r}, schema {head['schema']!r}")
            found = cls(Fingerprint(**head["model"]))
            for measure, values in scores.items():
                found.add(measure, values, head["settings"][measure])
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: `manyheads heads MODEL --out FOLDER` writes it") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a head profile that can be read ({error}): delete it and measure again"
            ) from error
        return found


def _from_json(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    head = read_json(path)
    return head, {name: torch.tensor(values, dtype=torch.float32) for name, values in head["scores"].items()}


def _from_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    metadata, tensors = read_tensors(path)
    return parse_json(metadata["profile"], "its metadata"), tensors


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; ValueError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"damaged, or no safetensors: {error}") from error
