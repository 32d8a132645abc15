"""Whether deeper layers attend further, and whether heads' patterns are the same on other inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from manyheads.explain.detectors.hops import agreement, cluster_heads, hop_strengths
from manyheads.explain.studies.drawing import chart, strip_plot
from manyheads.explain.studies.models import ModelStudy
from manyheads.explain.studies.study import Cell, Point, Verdict, always, both_ways, paired, register_study, said
from manyheads.hosts.loading import Loaded
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

HALVES = {"early": "first half of the layers", "late": "second half of the layers"}


@lru_cache(maxsize=2)
def _read(loaded: Loaded, length: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Strengths and patterns of one half of the windows that `seed` draws."""
    rng = generator("hop-strength", "text", seed)
    ids = torch.randint(33, 127, (count, length), generator=rng)
    if loaded.tokenizer is not None:
        ids = torch.randint(min(1000, loaded.config.vocab_size // 2), loaded.config.vocab_size, (count, length),
                            generator=rng)  # fmt: skip
    half = length // 2
    ids[:, half : 2 * half] = ids[:, :half]
    return hop_strengths(loaded, inputs=ids)


@register_study
@dataclass(frozen=True)
class HopStrength(ModelStudy):
    """Li et al., How Does Attention Work in Vision Transformers? A Visual Analytics Attempt, arXiv:2303.13731.

    Measured: the mean hops that a head's attention goes, of the heads in the first and in the second half of the
    layers; strength per hop (`hop_strengths`); and how well clusters of heads' patterns (`cluster_heads`) found on some
    inputs agree with those found on others, against labels put in another order.
    Divergence: a language model whose hops are tokens unless `--model` is given, and random tokens told twice.
    """

    name = "hop-strength"
    title = "Hops that attention goes, and clusters of heads"
    claim = (
        "Heads of deeper layers attend further than those of early ones, and heads fall into clusters of patterns that "
        "are the same on other inputs."
    )
    reference = "arXiv:2303.13731"
    simplified = (
        "A small language model on random tokens told twice, whose hops are tokens, in place of a vision transformer "
        "on pictures; `hop_strengths` itself reads both."
    )
    columns: ClassVar[Mapping[str, str]] = {"hops": "mean hops", "agree": "clusters agree", "chance": "by chance"}

    model: str = ""
    length: int = 96
    count: int = 4
    clusters: int = 4
    steps: int = 300

    def points(self) -> list[Point]:
        return [{"label": label, "half": name} for name, label in HALVES.items()]

    @torch.no_grad()
    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        (strengths, patterns), (_, other) = (_read(self.loaded, self.length, self.count, 2 * seed + i) for i in (0, 1))
        half = (len(strengths) + 1) // 2
        own = strengths[:half] if point["half"] == "early" else strengths[half:]
        mean = (own * torch.arange(own.shape[-1])).sum(-1) / own.sum(-1)
        # Of all layers, and so the same for both halves: told where the first is.
        clustered = [cluster_heads(own, self.clusters, seed=seed, steps=self.steps).labels
                     for own in (patterns, other) if point["half"] == "early"]  # fmt: skip
        curve = [{"hop": k, "strength": float(value)} for k, value in enumerate(own.mean((0, 1)))]
        found: dict[str, Any] = {"hops": float(mean.mean()), "curve": curve}
        if clustered:
            first, second = clustered
            order = torch.randperm(len(second), generator=generator(self.name, "order", seed))
            found |= {"agree": agreement(first, second), "chance": agreement(first, second[order])}
        return found

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        deeper = paired(cells, "hops", {"half": "late"}, {"half": "early"})
        alike = [(float(cell["agree"]), float(cell["chance"])) for cell in cells if cell["half"] == "early"]
        lines = (
            said("Mean hops of the second half of the layers, against the first", deeper),
            said("Agreement of clusters on other inputs, against labels in another order", alike),
        )
        return Verdict(both_ways([always(deeper), always(alike)]), {}, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        from manyheads.runs.charts import Plot

        rows = [{"condition": cell["mechanism"], "seed": cell["seed"], "hop": row["hop"] + 1,
                 "strength": round(row["strength"], 7)}
                for cell in cells for row in cell["curve"] if row["hop"] < 32 and row["strength"] > 0]  # fmt: skip
        drawn = chart(rows, "hop", "strength", across="hops, 1 is the query itself", up="share", log="y", points=False)
        return [
            Plot("strength", "Strength by hop", "Mean over heads of the attention that goes so far.", drawn),
            *strip_plot(cells, "agree", "Clusters", "Adjusted Rand index of clusters on two sets of inputs.", "index"),
        ]
