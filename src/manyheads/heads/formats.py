"""Head files of two repositories, read and written in their own layouts.

DuoAttention (mit-han-lab/duo-attention, arXiv 2410.10819): a folder with config.json, from which only sink_size and
recent_size are used there, and full_attention_heads.tsv, one line of tab-separated gates per layer, a column per KV
head, as numpy.savetxt writes it. Released gates lie slightly outside 0 to 1 and are clipped when read, as there.
Retrieval_Head (nightdessert/Retrieval_Head, arXiv 2404.15574): {"layer-head": [a score per trial]} on one line,
query heads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.runs.files import write_durably
from manyheads.runs.given import read_json, read_text

CONFIG, GATES = "config.json", "full_attention_heads.tsv"


@dataclass(frozen=True)
class DuoPattern:
    """gates [layers, KV heads] in 0 to 1; config: everything in config.json."""

    gates: Tensor
    sink_size: int
    recent_size: int
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        return str(self.config.get("model_name", ""))


def write_duo(folder: str | Path, pattern: DuoPattern) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**pattern.config, "sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    lines = ["\t".join(f"{gate:.18e}" for gate in row) for row in pattern.gates.double().tolist()]
    write_durably(folder / CONFIG, json.dumps(config).encode())
    write_durably(folder / GATES, ("\n".join(lines) + "\n").encode())


def read_duo(folder: str | Path) -> DuoPattern:
    folder = Path(folder)
    missing = [name for name in (CONFIG, GATES) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}: give the folder of one DuoAttention pattern")
    try:
        config = read_json(folder / CONFIG)
        sizes = [config["sink_size"], config["recent_size"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} is not a DuoAttention config with sink_size and recent_size: {error!r}"
        ) from (error)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"{folder / CONFIG}: sink_size and recent_size must be whole numbers from 0 on; got {sizes}")
    gates = torch.tensor(read_gates(folder / GATES), dtype=torch.float64)
    if not gates.isfinite().all():
        raise ValueError(f"{folder / GATES} has gates that are not finite: it is damaged, learn them again")
    return DuoPattern(gates.clamp(0, 1), sizes[0], sizes[1], config)


def read_gates(path: str | Path) -> list[list[float]]:
    """DuoAttention's full_attention_heads.tsv: a row of gates for every layer."""
    try:
        rows = [[float(cell) for cell in line.split()] for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a table of gates (one row of numbers per layer): {error}") from error
    if not rows or len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path} is not a table of gates: rows have {sorted({len(row) for row in rows})} columns")
    return rows


def write_retrieval(path: str | Path, scores: Tensor) -> None:
    """scores [layers, query heads, trials]."""
    named = {
        f"{layer}-{head}": scores[layer, head].tolist()
        for layer in range(scores.shape[0])
        for head in range(scores.shape[1])
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_durably(Path(path), json.dumps(named).encode())


def read_retrieval(path: str | Path) -> Tensor:
    """[layers, query heads, trials]; their mean over the trials is the retrieval score."""
    path = Path(path)
    try:
        # Their writer makes one line and their reader takes the first; a file that a person indented is read too.
        found = read_json(path)
        return _table(found)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f'{path} is not a Retrieval_Head file, {{"layer-head": [scores]}}: {error}') from error


def _table(found: Any) -> Tensor:
    if not isinstance(found, Mapping) or not found:
        raise ValueError("want an object with one list per head")
    places = {}
    for key, values in found.items():
        at = re.fullmatch(r"(\d{1,5})-(\d{1,5})", key)
        if not at or not isinstance(values, list):
            raise ValueError(f"{key!r} is no 'layer-head' with a list of scores")
        places[int(at[1]), int(at[2])] = [float(value) for value in values]
    layers, heads = (1 + max(place[i] for place in places) for i in (0, 1))
    trials = {len(values) for values in places.values()}
    if len(places) != layers * heads or len(trials) != 1:
        raise ValueError(
            f"{len(places)} heads with {sorted(trials)} scores each; want {layers} x {heads} heads with equally many"
        )
    rows = [[places[layer, head] for head in range(heads)] for layer in range(layers)]
    return torch.tensor(rows, dtype=torch.float64)
