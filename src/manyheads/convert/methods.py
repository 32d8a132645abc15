"""What a checkpoint can be converted to: each method with its knob, and the identities that prove it on a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from manyheads.convert.grouped import ALIGNMENTS, aligned, check_kv_heads, grouped
from manyheads.convert.hosted import check_hosted, hosted, transfer
from manyheads.convert.importance import MEASURES, head_scores
from manyheads.convert.latent import NORMS, check_latent, full_rank, latent, rotary_features
from manyheads.convert.layout import attentions, cache_numbers
from manyheads.convert.pruned import check_pruned, cut, kept_heads, pruned, zeroed
from manyheads.convert.rorope import can_turn, first_layer, rorope
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
    rope_dim: int | None = None
    fold: int | Literal["auto"] | None = None
    format: str = "deepseek_v3"
    name: ClassVar[str] = "mla"
    knob: ClassVar[str] = "--rank"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"--norm {self.norm!r}: want {' or '.join(NORMS)}")

    @property
    def _target(self) -> dict[str, Any]:
        return {"rope_dim": self.rope_dim, "fold": self.fold, "format": self.format}

    def title(self, value: int) -> str:
        rotary = "" if self.rope_dim is None else f", {self.rope_dim} rotary"
        folded = "" if self.fold is None else f", fold {self.fold}"
        saved = "" if self.format == "deepseek_v3" else f", {self.format}"
        return f"mla {value}{rotary}{folded}, {self.norm} norm{saved}"

    def check(self, model: Any, value: int) -> None:
        check_latent(model, value, self.norm, **self._target)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return latent(model, value, norm=self.norm, calibration=rows, **self._target)

    def within(self, model: Any, numbers: int) -> int:
        check_latent(model, 1, self.norm, **self._target)
        layers = attentions(model)
        beside = rotary_features(model, self.rope_dim) + (self.norm == "exact")
        rank = min(full_rank(model, self.rope_dim), numbers // len(layers) - beside)
        return rank if rank >= 1 else _too_small(numbers, len(layers) * (beside + 1))

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        fold = None if self.fold == "auto" else self.fold
        most = full_rank(model, self.rope_dim)

        def whole(format: str = "deepseek_v3") -> Any:
            return latent(model, most, rope_dim=self.rope_dim, fold=fold, format=format, calibration=rows)

        found = [Identity("the full rank where positions turn nothing", whole, still=True)]
        if can_turn(model):
            claim = "keys turned, in the first layer, and all of them keeping their positions"
            found.append(
                Identity(claim, lambda: rorope(first_layer(model), calibration=rows[:1]),
                         against=lambda: first_layer(model))
            )  # fmt: skip
        if self.format != "deepseek_v3":
            claim = f"{self.format}, against deepseek_v3 with the same weights"
            found.append(Identity(claim, lambda: whole(self.format), against=whole))
        return found


@dataclass(frozen=True)
class Pruned(Method):
    """See `pruned`."""

    by: str = "importance"
    uniform: bool = True
    name: ClassVar[str] = "prune"
    knob: ClassVar[str] = "--heads"

    def __post_init__(self) -> None:
        if self.by == "dimap":
            raise ValueError(
                "--by dimap scores hierarchical vision transformers, which have no text to measure on: from Python, "
                "manyheads.convert.dimap(model, share)"
            )
        if self.by not in MEASURES:
            raise ValueError(f"--by {self.by!r}: want one of {', '.join(MEASURES)}")

    @property
    def calibrated(self) -> bool:
        return self.by != "random"

    def title(self, value: int) -> str:
        return f"{value} heads{'' if self.uniform else ' over all layers'}, by {self.by}"

    def check(self, model: Any, value: int) -> None:
        check_pruned(model, value, uniform=self.uniform)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return pruned(model, value, by=self.by, uniform=self.uniform, calibration=rows)

    def within(self, model: Any, numbers: int) -> int:
        layer, count = attentions(model)[0], len(attentions(model))
        each = cache_numbers(model) // (layer.kv_heads * count)  # numbers of one key/value head
        groups = min(layer.kv_heads * count, numbers // each)
        if self.uniform:
            groups -= groups % count
        if groups < count:
            return _too_small(numbers, each * count)
        return groups * (layer.heads // layer.kv_heads)

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        kept = kept_heads(model, min(values), head_scores(model, (), "random"), uniform=self.uniform)
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


METHODS: Mapping[str, type[Method]] = {cls.name: cls for cls in (Grouped, Latent, Pruned)}


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
