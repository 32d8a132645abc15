"""Whether editing the map of patches that count makes decisions better: digits by their nearest, edits by a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from manyheads.explain.edited import EditableMap, patch_similarities
from manyheads.explain.studies.drawing import strip_plot
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, both_ways, paired, register_study, said
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

EDITS = {"none": "as attention has it", "ink": "patches with ink chosen", "random": "random patches toggled"}


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """Patches [pictures, 16, 4] of 2 x 2 pixels, and labels."""
    from sklearn.datasets import load_digits

    held = load_digits()
    pictures = torch.from_numpy(held.images).float().reshape(-1, 4, 2, 4, 2)
    return pictures.permute(0, 1, 3, 2, 4).reshape(-1, 16, 4), torch.from_numpy(held.target).long()


@register_study
@dataclass(frozen=True)
class EditedMaps(Study):
    """Nguyen et al., Allowing Humans to Interactively Guide Machines Where to Look Does Not Always Improve Human-AI
    Team's Classification Accuracy, arXiv:2404.05238.

    `EditableMap` on handwritten digits of 4 x 4 patches: the candidates are the nearest pictures, the first map is the
    patches whose variance over candidates is above its mean; edits come from two rules in place of people: patches with
    more ink than the mean, and a quarter of the patches toggled by chance. Measured: accuracy and flipped decisions.
    """

    name = "edited-maps"
    title = "Maps of patches edited"
    claim = "Edits of the map of patches that count flip decisions, and do not make them more accurate."
    reference = "arXiv:2404.05238"
    simplified = (
        "Two rules in the place of 18 people, handwritten digits in the place of birds, and a variance over candidates "
        "in the place of attention."
    )
    columns: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy", "flipped": "decisions flipped"}

    pictures: int = 150
    candidates: int = 40

    def points(self) -> list[Point]:
        return [{"label": label, "edit": name} for name, label in EDITS.items()]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        patches, labels = _digits()
        rng = generator(self.name, seed)
        order = torch.randperm(len(patches), generator=rng)
        asked, known = order[: self.pictures], order[self.pictures :]
        right, flipped = 0, 0
        for i in asked:
            far = (patches[known] - patches[i]).square().sum((1, 2))
            near = known[far.topk(self.candidates, largest=False).indices]
            spread = patches[near].var(0).mean(-1)
            held = EditableMap(patch_similarities(patches[i], patches[near]), labels[near].tolist(),
                               spread / spread.mean(), threshold=1.0)  # fmt: skip
            if point["edit"] == "ink":
                ink = patches[i].mean(-1)
                held.edit(ink > ink.mean())
            elif point["edit"] == "random":
                for patch in torch.randperm(16, generator=rng)[:4].tolist():
                    held.toggle(patch)
            right += held.decision == int(labels[i])
            flipped += held.decision != held.log[0].decision
        return {"accuracy": right / self.pictures, "flipped": flipped / self.pictures}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        parts: list[bool | None] = []
        lines = []
        for name in ("ink", "random"):
            pairs = paired(cells, "accuracy", {"edit": name}, {"edit": "none"})
            flips = [float(cell["flipped"]) for cell in cells if cell["edit"] == name]
            parts.append(all(more <= less for more, less in pairs) and min(flips) > 0 if pairs and flips else None)
            lines.append(said(f"Accuracy with {EDITS[name]}, against no edit", pairs))
        return Verdict(both_ways(parts), {}, tuple(lines))

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        return [
            *strip_plot(cells, "accuracy", "Accuracy", "Of digits by their nearest, after the edits.", "accuracy"),
            *strip_plot(cells, "flipped", "Flipped", "Decisions that the edits changed.", "share"),
        ]
