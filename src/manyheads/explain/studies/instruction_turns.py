"""Whether answers look less at the instruction that a talk began with, the longer the talk is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from manyheads.explain.detectors.spans import relevance_over_turns
from manyheads.explain.studies.drawing import chart, strip_plot
from manyheads.explain.studies.models import ModelStudy
from manyheads.explain.studies.study import Cell, Point, Verdict, always, both_ways, paired, register_study, said
from manyheads.hosts.probes import Inputs
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

INSTRUCTION = "Answer every question with comfort, in one short sentence.\n"


@register_study
@dataclass(frozen=True)
class InstructionTurns(ModelStudy):
    """Madani and Srihari, Steering Conversational Large Language Models for Long Emotional Support Conversations,
    arXiv:2402.10453.

    Strategy-relevant attention: the mean mass of a response's rows on the prompted strategy, over layers and heads
    (`relevance_over_turns`). Measured at the first and the last of several turns, beside |S| / (tokens seen).
    Divergence: an instruction of one sentence and turns cut from the library's text in place of emotional support, in
    a small model; the answers are given, not generated.
    """

    name = "instruction-turns"
    title = "Attention on the instruction over turns"
    claim = "Answers look at the instruction less in later turns, and more than even attention would at every turn."
    reference = "arXiv:2402.10453"
    simplified = "Turns cut from a text in place of a talk, answers that are given, and a small model."
    columns: ClassVar[Mapping[str, str]] = {"relevance": "mass on it", "chance": "by chance"}

    model: str = ""
    turns: int = 4
    turn: int = 24

    def points(self) -> list[Point]:
        return [{"label": "first answer", "turn_of": "first"}, {"label": "last answer", "turn_of": "last"}]

    @torch.no_grad()
    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        loaded = self.loaded
        inputs = Inputs(loaded, seed=generator(self.name, seed).initial_seed())
        told = torch.tensor(loaded.encode(INSTRUCTION))
        parts = [inputs.needles(max(96, 2 * self.turn), i).ids[: 2 * self.turn] for i in range(self.turns)]
        ids: Tensor = torch.cat([told, *parts])
        starts = [len(told) + (2 * i + 1) * self.turn for i in range(self.turns)]
        responses = [(start, start + self.turn) for start in starts]
        if point["turn_of"] == "first":
            found = relevance_over_turns(loaded, ids, (0, len(told)), responses[:1])
        else:
            found = relevance_over_turns(loaded, ids, (0, len(told)), responses)
        curve = [{"turn": i + 1, "relevance": own.relevance} for i, own in enumerate(found)]
        return {"relevance": found[-1].relevance, "chance": found[-1].chance, "curve": curve}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        less = paired(cells, "relevance", {"turn_of": "first"}, {"turn_of": "last"})
        beyond = [(float(cell["relevance"]), float(cell["chance"])) for cell in cells]
        lines = (
            said("Mass on the instruction at the first answer, against the last", less),
            said("Mass on the instruction, against even attention", beyond),
        )
        return Verdict(both_ways([always(less), always(beyond)]), {}, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        from manyheads.runs.charts import Plot

        rows = [{"condition": f"seed {cell['seed']}", "seed": cell["seed"], **row} for cell in cells
                if cell["turn_of"] == "last" for row in cell["curve"]]  # fmt: skip
        drawn = chart(rows, "turn", "relevance", across="turn", up="mass on the instruction")
        own = [Plot("turns", "Over turns", "Mean over layers and heads.", drawn)] if rows else []
        return own + strip_plot(cells, "relevance", "First and last", "Mean over layers and heads.", "mass")
