"""What a checkpoint can be converted to: each method with its knob, and the identities that prove it on a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from manyheads.convert.cases import TRIED, as_softmax
from manyheads.convert.grouped import ALIGNMENTS, aligned, check_kv_heads, grouped
from manyheads.convert.hosted import check_hosted, hosted, transfer
from manyheads.convert.imitation import check_loss
from manyheads.convert.latent import NORMS, check_latent, full_rank, latent
from manyheads.convert.layout import attentions, cache_numbers
from manyheads.convert.pruned import MEASURES, cut, head_scores, kept_heads, per_layer, pruned, zeroed
from manyheads.convert.shifted import BITS, check_shifted, settled, shifted
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
    usual: ClassVar[int | None] = None  # the knob's value without one, where half the cache is no measure

    def settled(self, model: Any) -> Any:
        """The model as it is saved, after all training."""
        return model

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
    loss: str = "output"
    rate: float | None = None
    name: ClassVar[str] = "mechanism"
    knob: ClassVar[str] = "--layers"

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def calibrated(self) -> bool:
        return self.transfer > 0

    def title(self, value: int) -> str:
        after = f", {self.transfer} steps of transfer by {self.loss}" if self.transfer else ""
        return f"{self.spec['name']} in {value} layers{after}"

    def check(self, model: Any, value: int) -> None:
        check_hosted(model, self.spec, self.layers)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        made = hosted(model, self.spec, self.layers)
        if self.transfer:
            with Progress().measure("attention transfer") as tell:
                transfer(made, model, self.layers, rows, steps=self.transfer, loss=self.loss, rate=self.rate, tell=tell)
        return made

    def within(self, model: Any, numbers: int) -> int:
        raise ValueError(f"--budget-bytes does not say which layers hold {self.spec['name']}: give --layers")

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        found = [Identity("softmax in every layer of our model", lambda: hosted(model))]
        whole = as_softmax(self.spec, model.config.num_attention_heads)
        if whole is not None:
            claim = f"{self.spec['name']} that is softmax's equal, in {len(self.layers)} layers"
            found.append(Identity(claim, lambda: hosted(model, whole, self.layers)))
        return found


@dataclass(frozen=True)
class Shifted(Method):
    """See `shifted`."""

    name: ClassVar[str] = "shiftadd"
    knob: ClassVar[str] = "--bits"
    usual: ClassVar[int | None] = BITS

    @property
    def calibrated(self) -> bool:
        return False

    def title(self, value: int) -> str:
        return f"shifts of {value} bits"

    def check(self, model: Any, value: int) -> None:
        check_shifted(model, value)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return shifted(model, value)

    def settled(self, model: Any) -> Any:
        return settled(model)

    def within(self, model: Any, numbers: int) -> int:
        raise ValueError("--budget-bytes is of the cache, which --to shiftadd leaves as it is: give --bits")

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        def once() -> Any:
            return settled(shifted(model, min(values)))

        return [Identity("weights that are shifts already", lambda: shifted(once(), min(values)), against=once)]


METHODS: Mapping[str, type[Method]] = {cls.name: cls for cls in (Grouped, Latent, Pruned, Shifted)}


def _too_small(numbers: int, least: int) -> int:
    raise ValueError(f"--budget-bytes leaves {numbers} numbers per token; the smallest cache here takes {least}")


@torch.no_grad()
def prove(method: Method, model: Any, values: Sequence[int], rows: Rows) -> None:
    """The identities of the method, on this model; RuntimeError where one fails, which is a bug of ours."""
    ids = torch.tensor([[(7 * i + 3) % model.config.vocab_size for i in range(TRIED)]], device=model.device)
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
