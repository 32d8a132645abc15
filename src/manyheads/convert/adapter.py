"""What was trained beside frozen models, in one safetensors file that says which models these were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from manyheads.hosts.fingerprint import Fingerprint, fingerprint
from manyheads.runs.files import write_atomically

SCHEMA = 1


def frozen(model: nn.Module) -> nn.Module:
    """The model, none of whose weights is trained from now on."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def write_adapter(
    path: str | Path, kind: str, trained: Mapping[str, Tensor], facts: Mapping[str, Any], models: Mapping[str, Any]
) -> Path:
    """The weights `trained`, the facts to build it again, and what tells the frozen `models`, by their part."""
    from safetensors.torch import save

    known = {part: asdict(fingerprint(model, type(model).__name__)) for part, model in models.items()}
    text = json.dumps({"schema": SCHEMA, "kind": kind, "facts": dict(facts), "models": known})
    tensors = {key: value.detach().contiguous().clone() for key, value in trained.items()}
    return write_atomically(path, save(tensors, {"manyheads": text}))


def read_adapter(path: str | Path, kind: str, models: Mapping[str, Any]) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The weights, on the CPU, and the facts. ValueError where the file is none of that kind, or was trained beside
    other models than these."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get("manyheads", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if record.get("schema") != SCHEMA or record.get("kind") != kind:
        found = record.get("kind", "of no kind that is known here")
        raise ValueError(f"{path} holds an adapter {found!r}; want {kind!r} of schema {SCHEMA}")
    for part, model in models.items():
        told = Fingerprint(**record["models"][part])
        apart = told.differences(fingerprint(model, type(model).__name__))
        if apart:
            raise ValueError(f"{path} was trained beside another {part} ({told.name}): {'; '.join(apart)}")
    return tensors, record["facts"]
