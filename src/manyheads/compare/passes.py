"""How a model is passed while it is trained: by one process, or by several that each have a part of the sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from manyheads.registry import mechanism_class
from manyheads.tasks import Batch, Task


class Passes(Protocol):
    device: torch.device

    def learn(self, task: Task, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and what is to be passed back for its gradient; both with the router's, where there is one."""

    def answers(self, task: Task, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """What the task scores, of all tokens."""

    def agreed(self, yes: bool) -> bool:
        """What all processes do: a clock may tell them different things."""


class Alone:
    """The whole sequence here. router_weight: of the model's auxiliary loss."""

    def __init__(self, device: torch.device, router_weight: float = 0.0) -> None:
        self.device, self.router_weight = device, router_weight

    def learn(self, task: Task, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        answer = model(**{name: rows.to(self.device) for name, rows in batch.inputs.items()})
        loss = task.loss(task.aligned(task.answered(answer)), batch.targets.to(self.device))
        routed = getattr(answer, "aux_loss", None)
        return loss, loss if routed is None else loss + self.router_weight * routed

    def answers(self, task: Task, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return task.answered(model(**{name: rows.to(self.device) for name, rows in inputs.items()}))

    def agreed(self, yes: bool) -> bool:
        return yes


class Shared:
    """This process's part of it, in an open `sequence_parallel`. count: of processes, of which DistributedDataParallel
    takes the mean of gradients where the sum is wanted."""

    def __init__(self, spread: Any, count: int, device: torch.device) -> None:
        self.spread, self.count, self.device = spread, count, device

    def learn(self, task: Task, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        whole = {**batch.inputs, "shift_labels": batch.targets}  # a task shifts nothing: targets lie as answers do
        loss = model(**self._part(whole)).loss
        return self.spread.total(loss), loss * self.count

    def answers(self, task: Task, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        whole: Tensor = self.spread.whole(task.answered(model(**self._part(inputs))))
        return whole

    def agreed(self, yes: bool) -> bool:
        return bool(self.spread.total(torch.tensor(float(yes), device=self.device)) == self.count)

    def _part(self, whole: dict[str, Tensor]) -> dict[str, Any]:
        return dict(self.spread.shard({name: rows.to(self.device) for name, rows in whole.items()}))


@contextmanager
def passes_of(accelerator: Any, model: Any, router_weight: float) -> Iterator[Passes]:
    """By as many processes as accelerate knows of. model: as it was prepared."""
    if accelerator.num_processes == 1:
        yield Alone(accelerator.device, router_weight)
        return
    from manyheads.parallel import sequence_parallel

    with sequence_parallel(accelerator.unwrap_model(model)) as spread:
        yield Shared(spread, accelerator.num_processes, accelerator.device)


def unspread(task: Task, names: Sequence[str]) -> str:
    """'' where the task's model with these mechanisms can be trained over several processes, or why it cannot."""
    if task.head != "causal-lm":
        return f"{task.name} is not for causal language models, the only ones that are trained over processes"
    if type(task).loss is not Task.loss:
        return f"{task.name} has a loss of its own, which is no sum over tokens; it is trained in one process"
    without = dict.fromkeys(name for name in names if not mechanism_class(name).card.parallel)
    return f"{', '.join(without)} cannot be spread over processes" if without else ""
