"""What a checkpoint can be converted to: each method with its knob, and the identities that prove it on a model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch

from manyheads.convert.distilled import check_student, student
from manyheads.convert.grouped import ALIGNMENTS, aligned, check_kv_heads, grouped
from manyheads.convert.healing import Healing
from manyheads.convert.hosted import check_hosted, hosted, transfer
from manyheads.convert.latent import NORMS, check_latent, full_rank, latent
from manyheads.convert.layout import attentions, cache_numbers
from manyheads.convert.pruned import MEASURES, cut, head_scores, kept_heads, per_layer, pruned, zeroed
from manyheads.runs.steps import Progress

Rows = Sequence[Sequence[int]]
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

    @abstractmethod
    def within(self, model: Any, numbers: int) -> int:
        """The largest value whose cache holds at most so many numbers per token; ValueError where none does."""

    @abstractmethod
    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]: ...

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def lesson(self) -> Healing | None:
        """What the source teaches before any healing."""
        return None

    def control(self, model: Any, value: int, healing: Healing | None) -> tuple[str, Any, Healing] | None:
        """What to compare with, trained as long without what the method does: its title, a model, its training."""
        return None if healing is None else ("control, healed", copy.deepcopy(model), healing)

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Grouped(Method):
    """See `grouped`."""

    align: str = "procrustes"
    name: ClassVar[str] = "gqa"
    knob: ClassVar[str] = "--kv-heads"

    def __post_init__(self) -> None:
        if self.align not in ALIGNMENTS:
            raise ValueError(f"--align {self.align!r}: want one of {', '.join(ALIGNMENTS)}")

    @property
    def calibrated(self) -> bool:
        return self.align == "procrustes"

    def title(self, value: int) -> str:
        return f"gqa {value}, {self.align}"

    def check(self, model: Any, value: int) -> None:
        check_kv_heads(model, value)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return grouped(model, value, align=self.align, calibration=rows)

    def within(self, model: Any, numbers: int) -> int:
        most = attentions(model)[0].kv_heads
        fit = [g for g in range(1, most + 1) if most % g == 0 and cache_numbers(model) * g // most <= numbers]
        return max(fit) if fit else _too_small(numbers, cache_numbers(model) // most)

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        most = attentions(model)[0].kv_heads
        found = [Identity("as many heads as before", lambda: grouped(model, most, align="mean"))]
        if self.align == "procrustes":
            found.append(Identity("heads turned and not yet pooled", lambda: aligned(model, min(values), rows)))
        return found


@dataclass(frozen=True)
class Latent(Method):
    """See `latent`."""

    norm: str = "exact"
    name: ClassVar[str] = "mla"
    knob: ClassVar[str] = "--rank"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"--norm {self.norm!r}: want {' or '.join(NORMS)}")

    def title(self, value: int) -> str:
        return f"mla {value}, {self.norm} norm"

    def check(self, model: Any, value: int) -> None:
        check_latent(model, value, self.norm)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return latent(model, value, norm=self.norm, calibration=rows)

    def within(self, model: Any, numbers: int) -> int:
        layers = attentions(model)
        beside = layers[0].head_dim + (self.norm == "exact")
        rank = min(full_rank(model), numbers // len(layers) - beside)
        return rank if rank >= 1 else _too_small(numbers, len(layers) * (beside + 1))

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        def whole() -> Any:
            return latent(model, full_rank(model), calibration=rows)

        return [Identity("the full rank where positions turn nothing", whole, still=True)]


@dataclass(frozen=True)
class Pruned(Method):
    """See `pruned`."""

    by: str = "importance"
    name: ClassVar[str] = "prune"
    knob: ClassVar[str] = "--heads"

    def __post_init__(self) -> None:
        if self.by not in MEASURES:
            raise ValueError(f"--by {self.by!r}: want one of {', '.join(MEASURES)}")

    @property
    def calibrated(self) -> bool:
        return self.by != "random"

    def title(self, value: int) -> str:
        return f"{value} heads, by {self.by}"

    def check(self, model: Any, value: int) -> None:
        per_layer(model, value)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return pruned(model, value, by=self.by, calibration=rows)

    def within(self, model: Any, numbers: int) -> int:
        layer, count = attentions(model)[0], len(attentions(model))
        groups = min(layer.kv_heads, numbers * layer.kv_heads // cache_numbers(model))
        if groups < 1:
            return _too_small(numbers, cache_numbers(model) // layer.kv_heads)
        return count * groups * (layer.heads // layer.kv_heads)

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        kept = kept_heads(model, min(values), head_scores(model, (), "random"))
        whole = [list(range(layer.heads)) for layer in attentions(model)]
        return [
            Identity("all heads kept", lambda: cut(model, whole)),
            Identity("heads cut, against the same heads set to zero", lambda: cut(model, kept),
                     against=lambda: zeroed(model, kept)),
        ]  # fmt: skip


@dataclass(frozen=True)
class Hosted(Method):
    """Another mechanism in some layers; see `hosted`. Its value is the number of layers, and says nothing more."""

    spec: Mapping[str, Any]
    layers: tuple[int, ...]
    transfer: int = 0
    rate: float = 1e-3
    name: ClassVar[str] = "mechanism"
    knob: ClassVar[str] = "--layers"

    @property
    def calibrated(self) -> bool:
        return self.transfer > 0

    def title(self, value: int) -> str:
        after = f", {self.transfer} steps of transfer" if self.transfer else ""
        return f"{self.spec['name']} in {value} layers{after}"

    def check(self, model: Any, value: int) -> None:
        check_hosted(model, self.spec, self.layers)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        made = hosted(model, self.spec, self.layers)
        if self.transfer:
            with Progress().measure("attention transfer") as tell:
                transfer(made, model, self.layers, rows, steps=self.transfer, rate=self.rate, tell=tell)
        return made

    def within(self, model: Any, numbers: int) -> int:
        raise ValueError(f"--budget-bytes does not say which layers hold {self.spec['name']}: give --layers")

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        return [Identity("softmax in every layer of our model", lambda: hosted(model))]


@dataclass(frozen=True)
class Distilled(Method):
    """A student of the source, see `student`, that first learns the source's relations (MiniLMv2).

    start: a model that the student is made of, in place of the source. teaching: how the relations are learnt.
    """

    width: int | None = None
    teaching: Healing | None = None
    start: Any = field(default=None, repr=False)
    name: ClassVar[str] = "distil"
    knob: ClassVar[str] = "--depth"

    @property
    def calibrated(self) -> bool:
        return False

    @property
    def lesson(self) -> Healing | None:
        return self.teaching

    @property
    def settings(self) -> dict[str, Any]:
        teaching = None if self.teaching is None else asdict(self.teaching)
        return {"width": self.width, "teaching": teaching, "own_start": self.start is not None}

    def title(self, value: int) -> str:
        return f"{value} layer{'s' * (value != 1)}" + (f" of width {self.width}" if self.width else "")

    def _of(self, model: Any) -> Any:
        return model if self.start is None else self.start

    def check(self, model: Any, value: int) -> None:
        check_student(self._of(model), value, self.width)
        for each in (model, self._of(model)) if self.teaching is not None else ():
            attentions(each)
        if self.start is None and self.width is None and value == model.config.num_hidden_layers:
            raise ValueError(f"--depth {value}: the student would be the teacher; give fewer layers, or a --width")

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return student(self._of(model), value, self.width)

    def within(self, model: Any, numbers: int) -> int:
        whole = self._of(model)
        layers = len(attentions(whole))
        width = whole.config.hidden_size
        each = cache_numbers(whole) // layers * (self.width or width) // width
        return min(layers, numbers // each) or _too_small(numbers, each)

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        return [Identity("a student of all layers", lambda: student(model, model.config.num_hidden_layers))]

    def control(self, model: Any, value: int, healing: Healing | None) -> tuple[str, Any, Healing] | None:
        """The same student, on the text alone for as many tokens."""
        plans = [plan for plan in (self.teaching, healing) if plan is not None]
        if not plans:
            return None
        alone = replace(plans[-1], form="full", tokens=sum(plan.tokens for plan in plans))
        return f"{self.title(value)}, text alone", self.make(model, value, ()), alone


METHODS: Mapping[str, type[Method]] = {cls.name: cls for cls in (Grouped, Latent, Pruned, Distilled)}


def _too_small(numbers: int, least: int) -> int:
    raise ValueError(f"--budget-bytes leaves {numbers} numbers per token; the smallest cache here takes {least}")


@torch.no_grad()
def prove(method: Method, model: Any, values: Sequence[int], rows: Rows) -> None:
    """The identities of the method, on this model; RuntimeError where one fails, which is a bug of ours."""
    ids = torch.tensor([[(7 * i + 3) % model.config.vocab_size for i in range(64)]], device=model.device)
    slack = _EXACT * (1 if model.dtype in (torch.float32, torch.float64) else 50)
    for identity in method.identities(model, values, rows):
        places = torch.zeros_like(ids) if identity.still else None
        original = model if identity.against is None else identity.against()
        before = original(ids, position_ids=places, use_cache=False).logits
        after = identity.make()(ids, position_ids=places, use_cache=False).logits
        gap = float((after - before).abs().max() / before.abs().max())
        if not gap < slack:
            raise RuntimeError(
                f"{identity.claim}: the logits of {type(model).__name__} should stay as they are, and change by "
                f"{gap:.2g} of the largest: a bug of manyheads; nothing was written, please report it"
            )
