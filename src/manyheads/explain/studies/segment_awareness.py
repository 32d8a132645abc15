"""Whether a response looks at the segment of its context that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from manyheads.explain.detectors.spans import contextual_awareness
from manyheads.explain.studies.drawing import strip_plot
from manyheads.explain.studies.models import ModelStudy
from manyheads.explain.studies.study import Cell, Point, Verdict, always, both_ways, register_study, said
from manyheads.hosts.probes import QUESTION, Inputs
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot


@register_study
@dataclass(frozen=True)
class SegmentAwareness(ModelStudy):
    """Si et al., Selecting Influential Samples for Long Context Alignment via Homologous Models' Guidance and
    Contextual Awareness Measurement (GATEAU), arXiv:2410.15633.

    A hidden key is told in one of several segments and asked for. Measured: the attention of the answer's rows on each
    segment and each segment's importance (`contextual_awareness`), for the segment that tells the key and for the
    others' mean; their cosine.
    Divergence: keys in a few hundred tokens and a small model; importance from losses, since perplexities of keys
    saturate; the selection of training data by two homologous models (`homologous_gap`, `influence_scores`) is not run.
    """

    name = "segment-awareness"
    title = "Attention on the segment that is needed"
    claim = (
        "The segment of a context that a response needs gets more of the response's attention and more importance, by "
        "what it is worth alone, than the other segments do."
    )
    reference = "arXiv:2410.15633"
    simplified = "A key in one of a few segments of text and a small model; no training data are selected."
    columns: ClassVar[Mapping[str, str]] = {
        "needed": "attention on it",
        "others": "on others",
        "importance": "importance",
        "score": "cosine",
    }

    model: str = ""
    segments: int = 4
    length: int = 240

    def points(self) -> list[Point]:
        return [{"label": f"key in the {word} segment", "place": word} for word in ("first", "middle", "last")]

    @torch.no_grad()
    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        inputs = Inputs(self.loaded, seed=generator(self.name, seed).initial_seed())
        depth = {"first": 0.0, "middle": 0.5, "last": 1.0}[point["place"]]
        needle = inputs.needles(self.length, 0, depth=depth)
        start, stop = needle.asked[0]
        at = int(needle.told[0][0])
        asked = max(start - len(self.loaded.encode(QUESTION)), needle.told[0][1])
        cuts = [round(i * asked / self.segments) for i in range(self.segments + 1)]
        # No cut goes through the key: it is moved behind it.
        cuts = [needle.told[0][1] if at < cut < needle.told[0][1] else cut for cut in cuts]
        parts = [needle.ids[a:b] for a, b in pairwise(cuts)]
        own = next(i for i in range(self.segments) if cuts[i] <= at < cuts[i + 1])
        question, answer = needle.ids[asked:start], needle.ids[start:stop]
        found = contextual_awareness(self.loaded, parts, question, answer, scale="loss")
        rest = [i for i in range(self.segments) if i != own]
        return {
            "needed": float(found.attention[own]),
            "others": float(found.attention[rest].mean()),
            "importance": float(found.importance[own]),
            "less": float(found.importance[rest].mean()),
            "score": found.score,
        }

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        looked = [(float(cell["needed"]), float(cell["others"])) for cell in cells]
        worth = [(float(cell["importance"]), float(cell["less"])) for cell in cells]
        lines = (
            said("Attention on the segment with the key, against the others' mean", looked),
            said("Its importance, against the others' mean", worth),
        )
        return Verdict(both_ways([always(looked), always(worth)]), {}, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        return [
            *strip_plot(cells, "needed", "Attention", "Of the answer on the segment with the key.", "share"),
            *strip_plot(cells, "score", "Awareness", "Cosine of attention and importance over segments.", "cosine"),
        ]
