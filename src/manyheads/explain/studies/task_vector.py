"""Whether a task shown by examples can be put into a prompt without any, as a learned sum of heads' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manyheads.explain.studies.drawing import strip_plot
from manyheads.explain.studies.study import (
    Cell,
    Point,
    Study,
    Verdict,
    always,
    both_ways,
    paired,
    register_study,
    said,
    seeded,
)
from manyheads.explain.studies.tiny import TinyTransformer
from manyheads.steer.task_vector import TaskVector, head_means, learn_task_vector
from manyheads.tasks.draw import distinct, generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

WAYS = {
    "none": "no examples",
    "sum": "no examples, all heads' mean outputs added",
    "learned": "no examples, learned sum added",
    "examples": "examples in the prompt",
}


def draw_tasks(rows: int, shots: int, vocab: int, shifts: Tensor, rng: Generator) -> Tensor:
    """[rows, 2 shots + 2] of x_1 f(x_1) .. x f(x), f(x) = x + s mod vocab with one s of `shifts` per row."""
    x = distinct(rows, shots + 1, 0, vocab, rng)
    s = shifts[torch.randint(len(shifts), (rows, 1), generator=rng)]
    return torch.stack([x, (x + s) % vocab], -1).flatten(1)


@lru_cache(maxsize=1)
def _trained(study: TaskVectorStudy, seed: int) -> tuple[nn.Module, Tensor]:
    """A model that does tasks from examples, and the shifts that are its tasks."""
    order = torch.randperm(study.vocab - 1, generator=generator(study.name, "shifts", seed)) + 1
    shifts, rng = order[: study.tasks], generator(study.name, "train", seed)
    with seeded(study.name, "weights", seed):
        model = TinyTransformer(study.vocab, 2 * study.shots + 2, dim=study.dim, heads=4, layers=2)
    optimiser = torch.optim.AdamW(model.parameters(), study.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, study.steps)
    for _ in range(study.steps):
        tokens = draw_tasks(study.batch, study.shots, study.vocab, shifts, rng)
        found = model(tokens[:, :-1])[:, ::2]
        optimiser.zero_grad()
        F.cross_entropy(found.flatten(0, 1), tokens[:, 1::2].flatten()).backward()
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False), shifts


@register_study
@dataclass(frozen=True)
class TaskVectorStudy(Study):
    """Saglam et al., Learning Task Representations from In-Context Learning, arXiv:2502.05390.

    A small transformer is trained on x_1 f(x_1) .. x f(x), f one of a few functions per row. For each function, heads'
    mean outputs at the last token of prompts with examples are summed by weights that gradient descent finds
    (`learn_task_vector`) and added to prompts of x alone. Measured: accuracy on other x than those learned from,
    without examples, with the unweighted sum, with the learned one, and with examples.
    Divergence: shifts of tokens in place of linear regression, so that accuracy can be told; a model of two layers.
    """

    name = "task-vector"
    title = "A task as a learned sum of heads' outputs"
    claim = (
        "Without examples a model does a task when a learned weighted sum of its heads' mean outputs over prompts with "
        "examples is added, better than with nothing or with the unweighted sum."
    )
    reference = "arXiv:2502.05390"
    simplified = "A model of two layers and shifts of tokens, in place of GPT-2 and linear regression or word tasks."
    columns: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy"}

    vocab: int = 16
    tasks: int = 4
    shots: int = 3
    dim: int = 32
    steps: int = 600
    batch: int = 64
    learning_rate: float = 0.01
    fit: int = 100

    def points(self) -> list[Point]:
        return [{"label": label, "way": name} for name, label in WAYS.items()]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        model, shifts = _trained(self, seed)
        hits = [self._accuracy(model, point["way"], shift, seed) for shift in shifts]
        return {"accuracy": sum(hits) / len(hits)}

    def _accuracy(self, model: nn.Module, way: str, shift: Tensor, seed: int) -> float:
        rng = generator(self.name, "eval", seed, int(shift))
        shown = draw_tasks(128, self.shots, self.vocab, shift[None], rng)
        # Half of the tokens are learned from, the other half asked.
        order = torch.randperm(self.vocab, generator=rng)[:, None]
        seen, asked = order[: self.vocab // 2], order[self.vocab // 2 :]
        if way == "examples":
            asked_rows = shown[torch.isin(shown[:, -2], asked)]
            return accuracy(model, asked_rows[:, :-1], asked_rows[:, -1])
        vector = self._vector(model, way, shown[:, :-1], seen, (seen[:, 0] + shift) % self.vocab)
        with vector.added(model):
            return accuracy(model, asked, (asked[:, 0] + shift) % self.vocab)

    def _vector(self, model: nn.Module, way: str, prompts: Tensor, seen: Tensor, answers: Tensor) -> TaskVector:
        if way == "learned":
            return learn_task_vector(model, prompts, seen, answers, steps=self.fit)
        outputs = head_means(model, prompts)
        every = torch.ones if way == "sum" else torch.zeros
        return TaskVector(every(outputs.shape[:2]), outputs)

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        learned = {"way": "learned"}
        parts = {way: paired(cells, "accuracy", learned, {"way": way}) for way in ("none", "sum")}
        lines = [said(f"Accuracy with the learned sum, against {WAYS[way]}", own) for way, own in parts.items()]
        return Verdict(both_ways([always(own) for own in parts.values()]), {}, tuple(lines))

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        text = "On tokens that nothing was learned from; mean over tasks."
        return strip_plot(cells, "accuracy", "Accuracy", text, "accuracy")


@torch.no_grad()
def accuracy(model: nn.Module, prompts: Tensor, answers: Tensor) -> float:
    return float((model(prompts)[:, -1].argmax(-1) == answers).double().mean())
