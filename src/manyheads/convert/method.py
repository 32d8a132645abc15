"""What a method of conversion is, and the proof of it on a model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from manyheads.convert.cases import TRIED
from manyheads.convert.healing import Healing
from manyheads.hosts.loading import Loaded
from manyheads.hosts.questions import Questions
from manyheads.runs.steps import Tell

Rows = Sequence[Sequence[int]]
# (what was made, the source, text, rows of calibration, what a stopped run goes on from, progress) -> what was taught
Teach = Callable[[Any, Any, Questions, Rows, Path, Tell], Any]
# Largest difference of logits that rounding makes, as a share of the largest logit, in float32.
_EXACT = 2e-3


@dataclass(frozen=True)
class Identity:
    """What must compute the same as the model (or as `against`). still: with all tokens at one place, where positions
    turn nothing."""

    claim: str
    make: Callable[[], Any]
    still: bool = False
    against: Callable[[], Any] | None = None


class Method(ABC):
    """A way to convert. knob: the option whose value says how far; its larger values cost less."""

    name: ClassVar[str]
    knob: ClassVar[str]

    @abstractmethod
    def title(self, value: int) -> str: ...

    @abstractmethod
    def check(self, model: Any, value: int) -> None:
        """ValueError where the model cannot be converted so."""

    @abstractmethod
    def make(self, model: Any, value: int, rows: Rows) -> Any:
        """A converted model; the given one is left as it is."""

    @property
    def usual(self) -> int | None:
        """The value where none is given; None: the one whose cache is half the model's."""
        return None

    def settled(self, model: Any) -> Any:
        """The model as it is saved, after all training."""
        return model

    @abstractmethod
    def within(self, model: Any, numbers: int) -> int:
        """The largest value whose cache holds at most so many numbers per token; ValueError where none does."""

    @abstractmethod
    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]: ...

    @property
    def calibrated(self) -> bool:
        return True

    def check_stored(self, dtype: str) -> None:
        """ValueError where the files' type has no room for what is made."""
        return

    def check_loaded(self, loaded: Loaded) -> None:
        """ValueError where what comes with the model does not fit."""
        return

    @property
    def lesson(self) -> Teach | None:
        """How the source teaches what was made of it, before any healing; None where it does not."""
        return None

    def control(self, model: Any, value: int, healing: Healing | None) -> tuple[str, Any, Healing] | None:
        """What to compare with, trained as long without what the method does: its title, a model, its training."""
        return None if healing is None else ("control, healed", copy.deepcopy(model), healing)

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]


def too_small(numbers: int, least: int) -> int:
    raise ValueError(f"--budget-bytes leaves {numbers} numbers per token; the smallest cache here takes {least}")


@torch.no_grad()
def prove(method: Method, model: Any, values: Sequence[int], rows: Rows) -> list[dict[str, Any]]:
    """The identities of the method, on this model, and by what share of the largest logit each was missed; RuntimeError
    where one fails, which is a bug of ours."""
    held = []
    ids = torch.tensor([[(7 * i + 3) % model.config.vocab_size for i in range(TRIED)]], device=model.device)
    slack = _EXACT * (1 if model.dtype in (torch.float32, torch.float64) else 50)
    for identity in method.identities(model, values, rows):
        places = torch.zeros_like(ids) if identity.still else None
        original = model if identity.against is None else identity.against()
        # Without a mask, places that do not count on would make of every token a document of its own.
        still = {"position_ids": places, "attention_mask": torch.ones_like(ids), "use_cache": False}
        before = original(ids, **still).logits
        after = identity.make()(ids, **still).logits
        gap = float((after - before).abs().max() / before.abs().max())
        if not gap < slack:
            raise RuntimeError(
                f"{identity.claim}: the logits of {type(model).__name__} should stay as they are, and change by "
                f"{gap:.2g} of the largest: a bug of manyheads; nothing was written, please report it"
            )
        held.append({"claim": identity.claim, "gap": gap})
    return held
