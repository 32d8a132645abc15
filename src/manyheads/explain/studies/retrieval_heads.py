"""Whether hidden keys are found by the heads that copy them: those masked against as many others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from manyheads.explain.detectors.patching import Head
from manyheads.explain.studies.drawing import strip_plot
from manyheads.explain.studies.models import ModelStudy, hidden_keys, needle_recall
from manyheads.explain.studies.study import Cell, Point, Verdict, always, both_ways, paired, register_study, said
from manyheads.heads import Inputs, retrieval
from manyheads.hosts.loading import Loaded
from manyheads.steer import scaled
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

MASKED = {"none": "no head masked", "retrieval": "retrieval heads masked", "random": "random heads masked"}


def top_and_others(scores: Tensor, count: int, seed: int) -> tuple[list[Head], list[Head]]:
    """The `count` heads of greatest score [layers, heads], and as many of the others by chance."""
    heads = scores.shape[1]
    order = scores.flatten().sort(descending=True, stable=True).indices
    left = order[count:]
    if len(left) < count:
        raise ValueError(f"{count} heads of {scores.numel()} leave too few others to compare with: a smaller share")
    drawn = left[torch.randperm(len(left), generator=generator("retrieval-heads", "others", seed))[:count]]
    best, others = ([(int(i) // heads, int(i) % heads) for i in own] for own in (order[:count], drawn))
    return best, others


@lru_cache(maxsize=1)
def _scores(loaded: Loaded, length: int, seed: int) -> Tensor:
    found, trials = retrieval(Inputs(loaded, seed=seed), lengths=(length,))
    if not found.shape[-1]:
        raise ArithmeticError(f"{loaded.name} found none of {trials} hidden keys: no head can be scored")
    return found.mean(-1)


@register_study
@dataclass(frozen=True)
class RetrievalHeads(ModelStudy):
    """Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv:2404.15574.

    Heads are scored on hidden keys (`manyheads.heads.retrieval`); the `share` of all heads with the greatest score is
    silenced, and as many others by chance, and other keys are asked for. Measured: the share of the keys' tokens that
    is said, and the share of heads with a score of at least 0.1.
    Divergence: keys of five digits in a few hundred tokens, scored by the likeliest next token after the right ones
    before it instead of ROUGE-1 of a sentence that is generated.
    """

    name = "retrieval-heads"
    title = "Retrieval heads masked"
    claim = "Hidden keys are lost when the few heads that copy them are masked, and kept when as many random heads are."
    reference = "arXiv:2404.15574"
    simplified = (
        "Keys of five digits in a few hundred tokens and a small model; the paper hides sentences in up to 50 thousand "
        "tokens. A token counts as said where it is the likeliest after the right ones before it."
    )
    columns: ClassVar[Mapping[str, str]] = {"recall": "keys said", "scored": "heads above 0.1"}

    model: str = ""
    length: int = 256
    count: int = 5
    share: float = 0.05

    def points(self) -> list[Point]:
        return [{"label": label, "masked": name} for name, label in MASKED.items()]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        loaded = self.loaded
        scores = _scores(loaded, self.length, seed)
        best, others = top_and_others(scores, max(1, round(self.share * scores.numel())), seed)
        needles = hidden_keys(loaded, self.length, self.count, seed, self.name)
        chosen = {"none": [], "retrieval": best, "random": others}[point["masked"]]
        # A factor of one changes nothing: the condition without masks goes the same way.
        factors = dict.fromkeys(chosen, 0.0) or {best[0]: 1.0}
        with scaled(loaded.model, factors):
            recall = needle_recall(loaded, needles)
        return {"recall": recall, "scored": float((scores >= 0.1).double().mean())}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        none, masked, other = ({"masked": name} for name in MASKED)
        lost, beyond = (paired(cells, "recall", more, masked) for more in (none, other))
        lines = (
            said("Keys said with no head masked, against retrieval heads masked", lost),
            said("Keys said with random heads masked, against retrieval heads masked", beyond),
        )
        return Verdict(both_ways([always(lost), always(beyond)]), {}, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        return [
            *strip_plot(cells, "recall", "Keys said", "Of the hidden keys' tokens; 1 is all of them.", "share"),
            *strip_plot(cells, "scored", "Retrieval heads", "Heads with a score of at least 0.1.", "share of heads"),
        ]
