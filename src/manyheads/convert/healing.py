"""Some training after a conversion: windows of text, half of them ending in a hidden key.

AdamW, half a cosine after a short warm-up, gradients clipped to 1; the same seed gives the same batches. Processes that
were launched together share the rows of each step (`ranks`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.adapters import adapted, check_reached
from manyheads.convert.keeping import Keeping, facts, kept_file
from manyheads.convert.layout import in_eval
from manyheads.convert.lessons import LESSONS, Lesson
from manyheads.convert.loop import take_steps
from manyheads.convert.ranks import Ranks
from manyheads.hosts.questions import Questions
from manyheads.runs.steps import Tell, silent

WARM = 0.05
FORMS = ("full", "lora", "distil")


@dataclass(frozen=True)
class Healing:
    """tokens in all, in rows of `length`, `batch` rows to a step. passkeys: share of the rows that end in a key.

    form: what is learnt and by what. full: the text, by all weights. lora: the text, by adapters on attention, which
    are part of the weights afterwards. distil: a teacher's expectations. relations: a teacher's queries, keys and
    values, as in MiniLMv2.
    """

    tokens: int
    rate: float = 1e-3
    length: int = 512
    batch: int = 8
    passkeys: float = 0.5
    seed: int = 0
    form: str = "full"

    def __post_init__(self) -> None:
        if self.form not in LESSONS:
            raise ValueError(f"--healing {self.form!r}: want one of {', '.join(FORMS)}")

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.length * self.batch)))


@contextmanager
def _whole(model: Any, seed: int) -> Iterator[Any]:
    yield model


# What is trained of the model, where it is not all of it.
_PARTS: Mapping[str, Callable[[Any, int], AbstractContextManager[Any]]] = {"lora": adapted}


def heal(
    model: Any,
    questions: Questions,
    plan: Healing,
    *,
    teacher: Any = None,
    keep: Path | None = None,
    tell: Tell = silent,
) -> Any:
    """The model, trained where it stands. questions: on text that nothing is measured on. teacher: a model, for the
    forms that have one. keep: the beginning of the path of what a stopped run goes on from; a run that has ended leaves
    its weights there, so that whatever it is part of goes on too. `forget` takes it away."""
    if plan.form in ("distil", "relations") and teacher is None:
        raise ValueError(f"healing {plan.form!r} learns from a teacher: give one")
    keeping = None
    if keep is not None:
        of = facts(model, teacher, questions.text, asdict(plan))
        keeping = Keeping(kept_file(keep), of)
    taught_by = in_eval() if teacher is None else in_eval(teacher)
    with taught_by, _PARTS.get(plan.form, _whole)(model, plan.seed), LESSONS[plan.form](model, teacher) as lesson:
        _train(model, lesson, questions, plan, keeping, tell)
    return model.eval()


def _train(
    model: Any,
    lesson: Lesson,
    questions: Questions,
    plan: Healing,
    keeping: Keeping | None,
    tell: Tell,
) -> None:
    ranks = Ranks.here()
    ranks.check(plan.batch)
    ranks.alike(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0)

    def learn(step: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * _share(step, plan.steps)
        loss = lesson(ranks.own(batch(questions, plan, step)).to(model.device))
        loss.backward()
        check_reached(model)
        told = loss.detach().clone()
        ranks.average([told, *(p.grad for p in trained)])
        return float(told)

    model.train()
    take_steps(model, optimizer, plan.steps, learn, seed=plan.seed, keeping=keeping, tell=tell)


def batch(questions: Questions, plan: Healing, step: int) -> Tensor:
    """The rows of one step, [batch, length]."""
    rng = random.Random(f"healing {plan.seed} {step}")
    rows = []
    for row in range(plan.batch):
        if rng.random() < plan.passkeys:
            trial = questions.passkey(plan.length, rng.random(), step * plan.batch + row)
            rows.append(trial.prefix + trial.tail)
        else:
            rows.append(questions.stretch(rng, plan.length))
    return torch.tensor(rows)


def _share(step: int, steps: int) -> float:
    warm = max(1, round(WARM * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
