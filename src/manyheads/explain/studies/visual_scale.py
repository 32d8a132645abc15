"""Whether visual heads come with size: language models of several widths that answer what is where in a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from manyheads.explain.detectors.scales import rank_correlation
from manyheads.explain.studies.drawing import chart
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, always, both_ways, register_study, said, seeded
from manyheads.explain.studies.tiny import Look, TinyTransformer
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot


def draw_pictures(rows: int, patches: int, colours: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Tokens [rows, patches + 2]: a colour per patch, a token that begins the question, and which patch is asked for;
    answers [rows]. Colours are 0.., the beginning is `colours`, patches asked for follow."""
    picture = torch.randint(colours, (rows, patches), generator=rng)
    asked = torch.randint(patches, (rows, 1), generator=rng)
    begin = torch.full((rows, 1), colours)
    return torch.cat([picture, begin, colours + 1 + asked], 1), picture.gather(1, asked)[:, 0]


def visual_figures(looks: Sequence[Look], patches: int) -> dict[str, float]:
    """Of the last query: mass on the picture [layers, heads], the share of heads above the picture's share of the
    tokens, and how concentrated the mass is, 1 - H(p) / log patches."""
    rows = torch.stack([look.weights[:, :, -1] for look in looks], 1).double()
    own = rows[..., :patches]
    mass = own.sum(-1)
    p = own / mass.clamp_min(1e-12)[..., None]
    sharp = 1 - torch.special.entr(p).sum(-1) / torch.tensor(float(patches)).log()
    chance = patches / rows.shape[-1]
    return {
        "mass": float(mass.mean()),
        "share": float((mass.mean(0) > chance).double().mean()),
        "concentration": float(sharp.mean()),
    }


@register_study
@dataclass(frozen=True)
class VisualScale(Study):
    """Bi et al., Unveiling Visual Perception in Language Models: An Attention Head Analysis Approach, arXiv:2412.18108.

    Measured: of the last query the mass on the picture's tokens, how concentrated it is, the share of heads above
    chance, over models of several widths, and each figure's rank correlation with the width. `visual_over_scales` does
    the same for any models of the library with pictures of one's own.
    Divergence: models of a few thousand weights, trained here on colours of patches, in place of published ones.
    """

    name = "visual-scale"
    title = "Visual heads over sizes"
    claim = "The larger a model, the more concentrated its heads attend to a picture, and the better it answers."
    reference = "arXiv:2412.18108"
    simplified = "Transformers of width 8 to 48 that tell a patch's colour, in place of published models of many sizes."
    columns: ClassVar[Mapping[str, str]] = {
        "mass": "mass",
        "share": "heads above chance",
        "concentration": "concentration",
        "accuracy": "accuracy",
    }

    widths: tuple[int, ...] = (8, 16, 32, 48)
    patches: int = 9
    colours: int = 6
    steps: int = 500
    batch: int = 64
    learning_rate: float = 0.01

    def points(self) -> list[Point]:
        return [{"label": f"width {width}", "width": width} for width in self.widths]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        rng = generator(self.name, "train", seed)
        held, right = draw_pictures(256, self.patches, self.colours, generator(self.name, "eval", seed))
        with seeded(self.name, "weights", point["width"], seed):
            model = TinyTransformer(self.colours + 1 + self.patches, self.patches + 2, dim=point["width"], heads=4,
                                    layers=2)  # fmt: skip
        optimiser = torch.optim.AdamW(model.parameters(), self.learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        for _ in range(self.steps):
            tokens, answers = draw_pictures(self.batch, self.patches, self.colours, rng)
            optimiser.zero_grad()
            F.cross_entropy(model(tokens)[:, -1], answers).backward()
            optimiser.step()
            schedule.step()
        looks: list[Look] = []
        with torch.no_grad():
            told = model(held, looks)[:, -1].argmax(-1)
        accuracy = float((told == right).double().mean())
        return {**visual_figures(looks, self.patches), "accuracy": accuracy}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        parts: list[bool | None] = []
        lines = []
        for key in ("concentration", "accuracy"):
            found = []
            for seed in sorted({cell["seed"] for cell in cells}):
                own = [cell for cell in cells if cell["seed"] == seed]
                if len(own) < max(2, len(self.widths)):
                    return Verdict(None, {}, ("Not every width was measured.",))
                found.append((rank_correlation([cell["width"] for cell in own], [cell[key] for cell in own]), 0.0))
            parts.append(always(found))
            lines.append(said(f"Rank correlation of {key} with the width, against none", found))
        return Verdict(both_ways(parts), {}, tuple(lines))

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        from manyheads.runs.charts import Plot

        found = []
        for key in ("concentration", "mass", "accuracy"):
            rows = [{"condition": f"seed {cell['seed']}", "seed": cell["seed"], "width": cell["width"],
                     key: round(cell[key], 6)} for cell in cells]  # fmt: skip
            drawn = chart(rows, "width", key, across="width", up=key, log="x")
            found.append(Plot(key, key.capitalize(), "Of the last query, over layers and heads.", drawn))
        return found
