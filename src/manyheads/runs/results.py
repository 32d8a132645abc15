"""Results: the dict that a run gives, read and written. A failed cell is counted and has no figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyheads.runs.files import write_atomically

SCHEMA = 1


Cell = Mapping[str, Any]


Results = Mapping[str, Any]


def cells_of(results: Results) -> list[Cell]:
    """The cells, after a check that this version can read them."""
    found = results.get("schema", SCHEMA)
    if found != SCHEMA:
        written = results.get("manyheads", "another version")
        raise ValueError(
            f"results have schema {found!r}, written by manyheads {written}; this version reads schema {SCHEMA}: "
            "run the comparison again into a new folder, or read it with the version that wrote it"
        )
    return list(results.get("cells", ()))


def mechanisms_of(results: Results) -> list[str]:
    """Every mechanism that has a cell, in order of appearance; the charts' colours follow this order."""
    return list(dict.fromkeys(cell["mechanism"] for cell in cells_of(results)))


def done(cell: Cell) -> bool:
    return cell.get("status") == "done"


def number(value: Any) -> float | None:
    """`value` where it is a finite number, else None: a diverged run has no figure, and shows as a failure."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def failures_of(results: Results) -> list[dict[str, Any]]:
    """Every cell without a figure, each with its reason: the failed, and those whose quality is not finite."""
    failures = []
    for cell in cells_of(results):
        if not done(cell):
            failures.append({**cell, "error": cell.get("error") or f"status {cell.get('status')!r}, no error given"})
        elif cell["kind"] == "quality" and number(cell.get("value")) is None:
            failures.append({**cell, "error": f"the run ended with {cell.get('metric')} = {cell.get('value')}"})
    return failures


def write_json(results: Results, path: str | Path) -> Path:
    """The results as strict JSON: a figure that is not finite becomes null."""
    return write_atomically(path, json.dumps(_finite(results), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
