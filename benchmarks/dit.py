"""What a packaged model that draws does draw: shares of samples with every subject right and in its place, by kind of
caption and by guidance, as a support vector machine reads the cells. `python benchmarks/dit.py [captions] [dit]` or
`[unet]`; the result has the model's name."""

from __future__ import annotations

import statistics
import sys
from typing import Any

import numpy as np

from common import save
from manyheads.hosts.loading import load_model
from manyheads.tasks.two_digits import RELATIONS, draw_scene, shown

WRITES = ("dit", "unet")
MEASURES = (
    "src/manyheads/bundled/dit",
    "src/manyheads/bundled/unet",
    "src/manyheads/models/captioned.py",
    "src/manyheads/models/diffusion.py",
    "src/manyheads/models/flow.py",
    "src/manyheads/models/unet.py",
)


def captions(kind: str, count: int) -> list[str]:
    """Two digits that differ, all pairs in turn."""
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    pairs = [pairs[(i * 37) % len(pairs)] for i in range(count)]
    if kind == "one digit":
        return [f"a {a}" for a, _ in pairs]
    relations = list(RELATIONS) if kind == "relation" else ["and"]
    return [f"a {a} {relations[i % len(relations)]} a {b}" for i, (a, b) in enumerate(pairs)]


def shares(pictures: Any, told: list[str]) -> dict[str, float]:
    seen = shown(pictures, told)
    return {key: statistics.fmean(own[key] for own in seen) for key in ("right", "swapped", "doubled")}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    name = sys.argv[2] if len(sys.argv) > 2 else "dit"
    model, rows = load_model(name).model, []
    for kind in ("relation", "and", "one digit"):
        told = captions(kind, count)
        rng = np.random.default_rng(0)
        real = model.noise(count, 0)
        for i, caption in enumerate(told):
            real[i, 0] = real.new_tensor(draw_scene(caption, rng, held_out=True))
        rows.append({"what": "held-out digits", "captions": kind, "count": count, **shares(real, told)})
        for guidance, steps in ((1.0, 20), (2.0, 20), (4.0, 20), (2.0, 5)):
            found = shares(model.sample(told, guidance=guidance, steps=steps), told)
            rows.append(
                {"what": "samples", "captions": kind, "count": count, "guidance": guidance, "steps": steps, **found}
            )
    save(name, "cpu", rows)


if __name__ == "__main__":
    main()
