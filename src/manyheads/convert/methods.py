"""What a checkpoint can be converted to: each method with its knob, and the identities that must hold of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from manyheads.convert.cases import as_softmax
from manyheads.convert.distilled import check_student, student
from manyheads.convert.grouped import ALIGNMENTS, aligned, check_kv_heads, grouped
from manyheads.convert.healing import Healing, heal
from manyheads.convert.hosted import check_hosted, hosted, takes_all
from manyheads.convert.imitation import check_loss, transfer
from manyheads.convert.importance import MEASURES, head_scores
from manyheads.convert.latent import NORMS, check_latent, check_room, full_rank, latent, rotary_features
from manyheads.convert.layout import attentions, cache_numbers
from manyheads.convert.method import Identity, Method, Rows, Teach, too_small
from manyheads.convert.primitives import primitive_mixture, settled_mixture
from manyheads.convert.pruned import check_pruned, cut, kept_heads, pruned, zeroed
from manyheads.convert.rorope import can_turn, first_layer, rorope
from manyheads.convert.shifted import BITS, check_shifted, settled, shifted
from manyheads.convert.upcycled import check_tokenizers, check_upcycled, upcycled
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.questions import Questions
from manyheads.runs.steps import Tell


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
        return max(fit) if fit else too_small(numbers, cache_numbers(model) // most)

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

    def check_stored(self, dtype: str) -> None:
        check_room(dtype, self.norm)

    def within(self, model: Any, numbers: int) -> int:
        check_latent(model, 1, self.norm, **self._target)
        layers = attentions(model)
        beside = rotary_features(model, self.rope_dim) + (self.norm == "exact")
        rank = min(full_rank(model, self.rope_dim), numbers // len(layers) - beside)
        return rank if rank >= 1 else too_small(numbers, len(layers) * (beside + 1))

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
            return too_small(numbers, each * count)
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
        return f"{self.spec['name']} in {value} layers"

    def check(self, model: Any, value: int) -> None:
        check_hosted(model, self.spec, self.layers)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return hosted(model, self.spec, self.layers)

    @property
    def lesson(self) -> Teach | None:
        return self._transfer if self.transfer else None

    def _transfer(self, made: Any, model: Any, text: Questions, rows: Rows, keep: Path, tell: Tell) -> Any:
        transfer(
            made, model, self.layers, rows,
            steps=self.transfer, loss=self.loss, rate=self.rate, keep=keep, tell=tell,
        )  # fmt: skip
        return made

    @property
    def usual(self) -> int:
        return len(self.layers)

    def within(self, model: Any, numbers: int) -> int:
        raise ValueError(f"--budget-bytes does not say which layers hold {self.spec['name']}: give --layers")

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        found = [Identity("softmax in every layer of our model", lambda: hosted(model))]
        whole = as_softmax(self.spec, model.config.num_attention_heads)
        if whole is not None and takes_all(model, whole, self.layers):
            claim = f"{self.spec['name']} that is softmax's equal, in {len(self.layers)} layers"
            found.append(Identity(claim, lambda: hosted(model, whole, self.layers)))
        return found


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
    def lesson(self) -> Teach | None:
        return None if self.teaching is None else self._teach

    def _teach(self, made: Any, model: Any, text: Questions, rows: Rows, keep: Path, tell: Tell) -> Any:
        assert self.teaching is not None
        return heal(made, text, self.teaching, teacher=model, keep=keep, tell=tell)

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
        return min(layers, numbers // each) or too_small(numbers, each)

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        return [Identity("a student of all layers", lambda: student(model, model.config.num_hidden_layers))]

    def control(self, model: Any, value: int, healing: Healing | None) -> tuple[str, Any, Healing] | None:
        """The same student, on the text alone for as many tokens."""
        plans = [plan for plan in (self.teaching, healing) if plan is not None]
        if not plans:
            return None
        alone = replace(plans[-1], form="full", tokens=sum(plan.tokens for plan in plans))
        return f"{self.title(value)}, text alone", self.make(model, value, ()), alone


@dataclass(frozen=True)
class Upcycled(Method):
    """See `upcycled`. sources: the models beside the first one; its value is how many there are in all."""

    sources: tuple[str, ...] = ()
    share_kv: bool = False
    active: int | None = None
    name: ClassVar[str] = "bam"
    knob: ClassVar[str] = "models"

    @cached_property
    def others(self) -> list[Loaded]:
        return [load_model(source, dtype="auto") for source in self.sources]

    @property
    def calibrated(self) -> bool:
        return False

    def title(self, value: int) -> str:
        return f"bam of {value}, {'shared' if self.share_kv else 'own'} keys and values"

    def check(self, model: Any, value: int) -> None:
        check_upcycled([model, *(other.model for other in self.others)], self.active)

    def check_loaded(self, loaded: Loaded) -> None:
        check_tokenizers([loaded, *self.others])

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return self._of([model, *(other.model for other in self.others)])

    @property
    def usual(self) -> int:
        return 1 + len(self.sources)

    def within(self, model: Any, numbers: int) -> int:
        raise ValueError("--budget-bytes does not go with --to bam: --share-kv keeps the cache as it is")

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        return [Identity("experts that are all the same", lambda: self._of([model] * values[0]))]

    def _of(self, models: Sequence[Any]) -> Any:
        return upcycled(models, share_kv=self.share_kv, active=self.active)


@dataclass(frozen=True)
class Shifted(Method):
    """See `shifted`; with a mixture `primitive_mixture`, of MLPs alone."""

    mixture: bool = False
    name: ClassVar[str] = "shiftadd"
    knob: ClassVar[str] = "--bits"

    @property
    def calibrated(self) -> bool:
        return False

    def title(self, value: int) -> str:
        return f"shifts of {value} bits{', mixed with products' if self.mixture else ''}"

    def check(self, model: Any, value: int) -> None:
        check_shifted(model, value)
        if self.mixture:
            check_hosted(model)

    def make(self, model: Any, value: int, rows: Rows) -> Any:
        return primitive_mixture(model, value) if self.mixture else shifted(model, value)

    def settled(self, model: Any) -> Any:
        return settled_mixture(model) if self.mixture else settled(model)

    @property
    def usual(self) -> int:
        return BITS

    def within(self, model: Any, numbers: int) -> int:
        raise ValueError("--budget-bytes is of the cache, which --to shiftadd leaves as it is: give --bits")

    def identities(self, model: Any, values: Sequence[int], rows: Rows) -> list[Identity]:
        def once() -> Any:
            return settled(shifted(model, min(values)))

        if self.mixture:
            return [Identity("two experts of products", lambda: primitive_mixture(model, None))]
        return [Identity("weights that are shifts already", lambda: shifted(once(), min(values)), against=once)]


METHODS: Mapping[str, type[Method]] = {cls.name: cls for cls in (Grouped, Latent, Pruned, Distilled, Upcycled, Shifted)}
