"""How a model is passed while it is trained: by one process, or by several that each have a part of the sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from manyheads.registry import mechanism_class
from manyheads.tasks import Batch, Task


class Passes(Protocol):
    device: torch.device

    def learn(self, task: Task, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and what is to be passed back for its gradient; both with the router's, where there is one."""

    def answers(self, task: Task, model: Any, batch: Batch) -> Tensor:
        """What the task scores, of all tokens."""

    def agreed(self, yes: bool) -> bool:
        """What all processes do: a clock may tell them different things."""


class Alone:
    """The whole sequence here. router_weight: of the model's auxiliary loss. autocast: of the model's forward pass."""

    def __init__(self, device: torch.device, router_weight: float = 0.0, autocast: Any = nullcontext) -> None:
        self.device, self.router_weight, self.autocast = device, router_weight, autocast

    def learn(self, task: Task, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        with self.autocast():
            answer = model(**inputs_of(task, model, batch, self.device))
        loss = task.loss(task.aligned(task.answered(answer)), batch.targets.to(self.device))
        routed = getattr(answer, "aux_loss", None)
        return loss, loss if routed is None else loss + self.router_weight * routed

    def answers(self, task: Task, model: Any, batch: Batch) -> Tensor:
        return task.answered(model(**inputs_of(task, model, batch, self.device)))

    def agreed(self, yes: bool) -> bool:
        return yes


class Shared:
    """This process's part of it, in an open `sequence_parallel`. count: of processes, of which DistributedDataParallel
    takes the mean of gradients where the sum is wanted."""

    def __init__(self, spread: Any, count: int, device: torch.device, autocast: Any) -> None:
        self.spread, self.count, self.device, self.autocast = spread, count, device, autocast

    def learn(self, task: Task, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        # A task shifts nothing: targets lie as answers do.
        whole = inputs_of(task, model, batch, self.device) | {"shift_labels": batch.targets.to(self.device)}
        with self.autocast():
            loss = model(**self.spread.shard(whole)).loss
        return self.spread.total(loss), loss * self.count

    def answers(self, task: Task, model: Any, batch: Batch) -> Tensor:
        part = inputs_of(task, model, batch, self.device)
        whole: Tensor = self.spread.whole(task.answered(model(**self.spread.shard(part))))
        return whole

    def agreed(self, yes: bool) -> bool:
        return bool(self.spread.total(torch.tensor(float(yes), device=self.device)) == self.count)


def inputs_of(task: Task, model: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What the model is called with: of what the task gives beside its tokens no more than it reads, as a contestant
    that reads none of it is shown the tokens alone."""
    from manyheads.models.beside import GIVEN

    own = getattr(model, "module", model)  # behind a wrapper for several processes
    left_out = set(task.beside) & set(GIVEN) - (own.reads if task.beside else set())
    return {name: rows.to(device) for name, rows in batch.inputs.items() if name not in left_out}


@contextmanager
def passes_of(accelerator: Any, model: Any, router_weight: float) -> Iterator[Passes]:
    """By as many processes as accelerate knows of. model: as it was prepared."""
    if accelerator.num_processes == 1:
        yield Alone(accelerator.device, router_weight, accelerator.autocast)
        return
    from manyheads.parallel import sequence_parallel

    with sequence_parallel(accelerator.unwrap_model(model)) as spread:
        yield Shared(spread, accelerator.num_processes, accelerator.device, accelerator.autocast)


def unspread(task: Task, names: Sequence[str]) -> str:
    """'' where the task's model with these mechanisms can be trained over several processes, or why it cannot."""
    if task.head != "causal-lm":
        return f"{task.name} is not for causal language models, the only ones that are trained over processes"
    if type(task).loss is not Task.loss:
        return f"{task.name} has a loss of its own, which is no sum over tokens; it is trained in one process"
    without = dict.fromkeys(name for name in names if not mechanism_class(name).card.parallel)
    return f"{', '.join(without)} cannot be spread over processes" if without else ""
