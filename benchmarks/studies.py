"""Every study of `manyheads explain study` at its own size and seeds: is the published claim seen?

A stopped run goes on where it was; what is named runs alone, and joins the rows that are there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, save
from manyheads.explain.studies.running import run_study
from manyheads.explain.studies.study import list_studies, study_class
from manyheads.runs.results import done

MEASURES = ("src/manyheads/explain/studies", "src/manyheads/mechanisms", "src/manyheads/tasks/draw.py")

# Claims about trained language models; the others train their own, or take the packaged ones.
ON_A_REAL_MODEL = dict.fromkeys(("retrieval-heads", "massive-cost", "circuit-reuse"), "smollm2")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="studies; every one without it")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = RESULTS / "studies.json"
    rows = {row["study"]: row for row in json.loads(kept.read_text())["rows"]} if kept.is_file() else {}
    for name in arguments.names or list_studies():
        rows[name] = row(name, arguments.out / name)
        save("studies", "cpu", [rows[own] for own in sorted(rows)])


def row(name: str, out: Path) -> dict[str, Any]:
    model = ON_A_REAL_MODEL.get(name)
    start = time.monotonic()
    found = run_study(name, out, settings={"model": model} if model else {})
    cells = [cell for cell in found["cells"] if done(cell)]
    return {
        "study": name,
        "reference": study_class(name).reference,
        "claim": study_class(name).claim,
        "model": model or "",
        "seeds": len({cell["seed"] for cell in cells}),
        "cells": len(cells),
        "failed": len(found["cells"]) - len(cells),
        "seen": found["verdict"]["seen"],
        "lines": found["verdict"]["lines"],
        "seconds": sum(cell.get("seconds", 0.0) for cell in cells) or time.monotonic() - start,
    }


if __name__ == "__main__":
    main()
