"""What a task is: where the batches come from, what the model must be able to hold, and how its answers are scored."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Generator, Tensor, nn

from manyheads.tasks.draw import generator

IGNORED = -100
_BLOCK = (
    64  # evaluation examples are drawn so many at a time, whatever the batch size, so that they are always the same
)


class Batch(NamedTuple):
    """inputs: tensors under Hugging Face's names (`input_ids`, `decoder_input_ids`, `pixel_values`). targets: what the
    logits at the same place should say ([b, n] or [b], nothing is shifted later), -100 where nothing is asked."""

    inputs: dict[str, Tensor]
    targets: Tensor

    def rows(self, start: int, stop: int | None) -> Batch:
        return Batch({name: rows[start:stop] for name, rows in self.inputs.items()}, self.targets[start:stop])

    def joined(self, other: Batch) -> Batch:
        inputs = {name: torch.cat([rows, other.inputs[name]]) for name, rows in self.inputs.items()}
        return Batch(inputs, torch.cat([self.targets, other.targets]))


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One task with its settings. Subclasses are frozen dataclasses: their fields are the config, as JSON values.

    pattern: which of the attention patterns the task needs. head: "causal-lm", "seq2seq-lm", "sequence-classification",
    "image-classification", "semantic-segmentation", "object-detection" or "node-classification". metric: what `score`
    adds up. beside: what the model passes to mechanisms whose card takes it by name. grows: the argument of which a
    multiple makes the examples that much longer and changes nothing else.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pattern: ClassVar[str]
    head: ClassVar[str] = "causal-lm"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ()
    grows: ClassVar[str] = "n"

    @property
    @abstractmethod
    def n(self) -> int:
        """Length of the sequence (of the encoder's, where there are two)."""

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make this task again: `create_task(task.name, **task.config) == task`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def longer(self, times: int) -> Self:
        """The same task on examples about `times` as long, for a model that was trained on this one: same vocabulary,
        same answers. Raises ValueError where there is no such task."""
        whole(self, "times", times, 2, 64)
        if self.grows not in self.config:
            raise ValueError(f"{self.name}: no argument of it makes its examples longer and leaves all else as it is")
        made = replace(self, **{self.grows: times * self.config[self.grows]})
        for key, value in made.model_settings().items():
            if key != "max_length" and value != self.model_settings().get(key):
                raise ValueError(f"{self.name}: {times} times as long it needs {key}={value}, which the model has not")
        return made

    @abstractmethod
    def model_settings(self) -> dict[str, Any]:
        """What a model must have to take this task; some of vocab_size, num_labels, max_length, image_size,
        patch_size, num_channels, decoder_causal, num_token_kinds, max_2d_position_embeddings."""

    @abstractmethod
    def train_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Endless, and the same again for the same batch size and seed."""

    @abstractmethod
    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Finite; the same examples in the same order every time, whatever the batch size. The last may be smaller."""

    def answered(self, output: Any) -> Tensor:
        """Of a model's output what loss and score are of, a row for each example."""
        logits: Tensor = output.logits
        return logits

    def aligned(self, logits: Tensor) -> Tensor:
        """The model's logits with classes last, as the targets lie."""
        return logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What training makes small, of answers as `aligned` gives them."""
        return loss_of(logits, targets)

    def score(self, logits: Tensor, targets: Tensor) -> tuple[float, int]:
        """The metric's sum and count over targets [...] other than -100, for logits [..., classes]."""
        return correct(*self.asked(logits, targets))

    def asked(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [k, classes] and targets [k] of the k places where something is asked."""
        if logits.shape[:-1] != targets.shape:
            raise ValueError(
                f"{self.name}: logits {list(logits.shape)} do not fit targets {list(targets.shape)}; "
                f"want logits {[*targets.shape, 'classes']}, one row for each target"
            )
        counted = targets != IGNORED
        return logits[counted], targets[counted]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits [..., classes] at the targets [...] that ask for something; nothing is shifted."""
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED)


def correct(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    """How many of the k targets have the highest logit, and k. NaN logits give NaN: a diverged model is no guess."""
    if logits.isnan().any():
        return math.nan, len(targets)
    return float((logits.argmax(-1) == targets).sum()), len(targets)


def bits(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    """Bits that the k targets cost under the model's distribution, summed, and k."""
    chosen = logits.double().log_softmax(-1).gather(-1, targets[:, None])
    return float(-chosen.sum()) / math.log(2), len(targets)


@dataclass(frozen=True, kw_only=True)
class Generated(Task):
    """A task whose examples are drawn: evaluation from a stream of its own, training from one stream per seed."""

    eval_examples: int = 1024

    @abstractmethod
    def sample(self, count: int, rng: Generator) -> Batch:
        """`count` independent examples."""

    def __post_init__(self) -> None:
        whole(self, "eval_examples", self.eval_examples, 1, 1_000_000)

    def train_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        rng = generator(self.name, "train", index(seed))
        return iter(lambda: self.sample(batch_size, rng), None)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        rng = generator(self.name, "eval")
        starts = range(0, self.eval_examples, _BLOCK)
        return regrouped((self.sample(min(_BLOCK, self.eval_examples - start), rng) for start in starts), batch_size)


def regrouped(pieces: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same examples in the same order, `size` at a time."""
    held: Batch | None = None
    for piece in pieces:
        held = piece if held is None else held.joined(piece)
        while len(held.targets) >= size:
            yield held.rows(0, size)
            held = held.rows(size, None)
    if held is not None and len(held.targets):
        yield held


def whole(task: Task, argument: str, value: Any, low: int, high: int, why: str = "") -> None:
    """Raises ValueError unless `value` is a whole number in low..high; `why` says where the bounds come from."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"{task.name}: {argument}={value!r}; want a whole number from {low} to {high}{why and f' ({why})'}"
        )


MAX_LENGTH = 1 << 20
MAX_VOCABULARY = 1 << 20

T = TypeVar("T", bound=type[Task])
registered: dict[str, type[Task]] = {}


def register_task(cls: T) -> T:
    """Class decorator: makes `cls` known under `cls.name`."""
    if cls.name in registered:
        raise ValueError(f"two tasks are named {cls.name!r}; rename one of them")
    registered[cls.name] = cls
    return cls
