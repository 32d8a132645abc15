"""What a policy says: which entries each KV head keeps, how many, and when. The cache asks, policy.py is for users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from manyheads.shrink.hints import Hinted

if TYPE_CHECKING:
    from manyheads.hosts.attend import Scoring
    from manyheads.hosts.visibility import Visibility
    from manyheads.shrink.compress import View
    from manyheads.shrink.group import Codec, Group

PER = ("head", "layer", "model")
WHEN = ("prefill", "passes", "decode", "both")


class Allocation(Protocol):
    """How a budget is shared out, given the mean [b or 1] per head; entries in, entries out."""

    def of_layer(self, mean: Tensor, layer: int, layers: int, count: Tensor) -> Tensor: ...

    def of_heads(self, scores: Tensor, targets: Tensor) -> Tensor: ...


class Storage(Protocol):
    """How keys and values are held where not as they are: see quantised.py."""

    @property
    def residual(self) -> int: ...

    def codec(self) -> Codec: ...


class Protection(Protocol):
    """Which tokens of texts, ids [b, n], are never dropped, [b, n]: see template.py."""

    def places(self, ids: Tensor) -> Tensor: ...

    def single(self, ids: Tensor) -> Tensor: ...


@dataclass(kw_only=True)
class Rules(Hinted):
    """Budget and moment, common to all policies. At most one budget; none keeps everything.

    compression_ratio: the share of the tokens that is dropped (0.75 keeps a quarter). budget_tokens: entries for each
    KV head on average; budget_bytes: bytes for the whole cache; budget_per="head", "layer" or "model" counts either
    otherwise. The first two may be lists, one number for each layer.
    when: "prefill" drops once, from the context, which is the first pass (or the prompt that generate feeds in chunks),
    and keeps all that follows; "passes" at every pass of several tokens, so that a question competes with the context;
    "decode" at single tokens; "both" at all. interval: decoding lets a head grow this many entries over before it is
    cut back. storage: Quantised(bits=4) holds keys and values as codes, ThinK() narrower keys. positions: "text" leaves
    rotary keys where they stood in the text; "cache" moves those that stay up to the next token, as if nothing had been
    between (moving.py). protect: ChatTemplate.of(tokenizer) names tokens that are never dropped.
    """

    compression_ratio: float | Sequence[float] | None = None
    budget_tokens: int | Sequence[int] | None = None
    budget_bytes: int | None = None
    budget_per: str | None = None
    when: str = "both"
    interval: int = 1
    allocation: Allocation | None = None
    storage: Storage | None = None
    positions: str = "text"
    protect: Protection | None = None

    # Numbers kept beside every entry.
    notes: ClassVar[tuple[str, ...]] = ()
    # Room is made before a token comes, so that no query sees more than the budget; the rule then has no new query.
    evicts_before: ClassVar[bool] = False
    # Entries carry a note "bias", which is added to their scores: the logarithm of how many tokens each stands for.
    weighted: ClassVar[bool] = False
    # Nothing is dropped: budget_tokens says how many entries a query reads of each head, and `read` which.
    reads: ClassVar[bool] = False
    # Entries are overwritten by mixtures of several tokens, which stand nowhere.
    fuses: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    places: ClassVar[bool] = False
    drops_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.reads:
            self._check_reads()
        given = {
            key: getattr(self, key)
            for key in ("compression_ratio", "budget_tokens", "budget_bytes")
            if getattr(self, key) is not None
        }
        if len(given) > 1:
            raise ValueError(f"{name}: one budget, please; got {', '.join(given)}")
        self._check_sizes()
        self._check_lists()
        if self.budget_per is not None and self.budget_per not in PER:
            raise ValueError(f"{name}: budget_per is one of {', '.join(PER)}; got {self.budget_per!r}")
        if self.budget_per is not None and self.budget_tokens is None and self.budget_bytes is None:
            raise ValueError(f"{name}: budget_per says what budget_tokens or budget_bytes counts; give one of them")
        if self.when not in WHEN:
            raise ValueError(f"{name}: when is one of {', '.join(WHEN)}; got {self.when!r}")
        if not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"{name}: interval must be a whole number of tokens of at least 1; got {self.interval!r}")
        _check_storage(name, self.storage)
        if self.protect is not None and not callable(getattr(self.protect, "places", None)):
            raise ValueError(f"{name}: protect is ChatTemplate.of(tokenizer) or nothing; got {self.protect!r}")
        self._check_positions()
        least = min(each(self.budget_tokens), default=None)
        if least is not None and self.budget_per in (None, "head") and least < self.smallest:
            raise ValueError(f"{name}: budget_tokens={least} is below the {self.smallest} that it always keeps")

    def _check_sizes(self) -> None:
        name = type(self).__name__
        for ratio in each(self.compression_ratio):
            if not 0 <= ratio < 1:
                raise ValueError(
                    f"{name}: compression_ratio is the share that is dropped, from 0 to below 1; got {ratio}"
                )
        of_bytes = [] if self.budget_bytes is None else [self.budget_bytes]
        for key, sizes in (("budget_tokens", each(self.budget_tokens)), ("budget_bytes", of_bytes)):
            for own in sizes:
                if not isinstance(own, int) or own < 1:
                    raise ValueError(f"{name}: {key} must be a whole number of at least 1; got {own!r}")

    def _check_lists(self) -> None:
        """Budgets of each layer: for policies that tell their heads nothing but what their layer is told."""
        name, by_layer = type(self).__name__, [key for key in _LISTS if is_list(getattr(self, key))]
        if not by_layer:
            return
        key = by_layer[0]
        if self.by_layer or self.reads:
            raise ValueError(f"{name} shares its budget out by itself; give {key} as one number, not a list by layers")
        if self.budget_per == "model":
            raise ValueError(f"{name}: a list of {key} is for layers; budget_per is 'head' or 'layer' there")
        if getattr(self.allocation, "across_layers", False):
            raise ValueError(
                f"{name}: {type(self.allocation).__name__} shares one budget out among the layers; leave it out, or "
                f"give {key} as one number"
            )

    def _check_positions(self) -> None:
        name = type(self).__name__
        if self.positions not in ("cache", "text"):
            raise ValueError(f"{name}: positions is 'cache' or 'text'; got {self.positions!r}")
        if self.positions == "cache" and self.fuses:
            raise ValueError(f"{name} fuses tokens, so that its keys stand at no one position: leave positions='text'")
        if self.moves and self.storage is not None and self.when != "prefill":
            raise ValueError(
                f"{name}: positions='cache' with when={self.when!r} turns keys again and again, and coding them anew "
                "each time would add up errors: give when='prefill', or leave storage out"
            )

    def check_layers(self, layers: int) -> None:
        """Lists have a number for each layer of the model."""
        for key in _LISTS:
            given = getattr(self, key)
            if is_list(given) and len(given) != layers:
                raise ValueError(
                    f"{type(self).__name__}: {key} has {len(given)} numbers, and the model {layers} layers; "
                    "give as many"
                )

    def _check_reads(self) -> None:
        name = type(self).__name__
        for field in fields(Rules):
            if field.name != "budget_tokens" and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{name} keeps everything as it came, so {field.name}={getattr(self, field.name)!r} "
                    "has no meaning; budget_tokens says how many entries are read"
                )

    # What a policy says.

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Whether layers with different numbers may be told different targets.
        cls.by_layer = cls.targets is not Rules.targets or cls.mean_target is not Rules.mean_target
        cls.observes = cls.observe is not Rules.observe
        cls.places = cls.placed is not Rules.placed
        # Whether an entry leaves without changing others.
        cls.drops_alone = cls.merge is Rules.merge

    def worst(self, view: View) -> Tensor | int:
        """[b, g]: the place of the entry that leaves where each head drops one; an int where it is one for all."""
        return self.score(view).argmin(-1)

    @property
    def looks_back(self) -> int:
        """The latest queries that `score` asks for; more than one are kept while decoding."""
        return 1

    @property
    def moves(self) -> bool:
        """Whether keys that stay are moved up to the next token."""
        return self.positions == "cache" and not self.is_full

    @property
    def smallest(self) -> int:
        """Entries that a head keeps whatever the budget: protected ones, and one more."""
        return 1

    @property
    def apart(self) -> bool:
        """Whether layers with different numbers may be told different targets."""
        return self.by_layer or any(is_list(getattr(self, key)) for key in _LISTS)

    @property
    def is_full(self) -> bool:
        none = not any(each(self.compression_ratio)) and self.budget_tokens is None and self.budget_bytes is None
        return none or self.reads

    def score(self, view: View) -> Tensor:
        """[b, g, m], higher stays longer."""
        raise NotImplementedError(
            f"{type(self).__name__} has a budget and no rule: use a policy such as StreamingLLM, or override `score`"
        )

    def observe(self, view: View) -> None:
        """Called after every pass, for notes that add up."""

    def merge(self, view: View, keep: Tensor) -> Tensor:
        """Called before entries are dropped, with those that stay, keep [b, g, m]: may overwrite entries by view.put
        and name others that stay, as many of them."""
        return keep

    def read(self, layer: Any, queries: Tensor, group: Group, scoring: Scoring, seen: Visibility) -> Tensor | None:
        """Where `reads`: attention [b, g, r, n, dv] of queries [b, g, r, n, d] to the entries that they choose, None
        for the ordinary attention. layer.memo holds what the layer keeps, layer.shared what layers share in a pass,
        layer.read how many entries a query read of each head."""
        return None

    def prepare(self, model: Any, cache: Any) -> None:
        """Called once for every new cache."""

    def placed(self, layer: Any, view: View) -> None:
        """Called for every group of heads after entries were dropped."""

    def targets(self, mean: Tensor, layer: Any, heads: int) -> Tensor:
        """[b or 1, H]: entries for every head, from their mean [b or 1]."""
        return mean.long()[:, None].expand(-1, heads).clamp_min(self.smallest)

    # What the cache asks.

    @property
    def parts(self) -> tuple[Rules, ...]:
        """Policies that act one after the other."""
        return (self,)

    def acts(self, *, decoding: bool, context: bool = False) -> bool:
        """decoding: whether tokens come one by one. context: whether the pass is of the text that came first."""
        moments = {"prefill": context and not decoding, "passes": not decoding, "decode": decoding, "both": True}
        return moments[self.when]

    def mean_target(self, layer: Any, view: View) -> Tensor:
        """[b or 1]: entries per head, on average."""
        ratio = of_layer(self.compression_ratio, layer.index)
        if ratio is not None:
            # As exact as the ratio was written: 10 tokens less a ratio of 0.9 is one token, not 0.99999.
            return (view.fed.cpu().double() * (1 - ratio) + 1e-9).floor()
        return torch.tensor([self.fixed_target(layer)], dtype=torch.float64)

    def fixed_target(self, layer: Any) -> float:
        groups = layer.store.groups
        heads = sum(len(group.heads) for group in groups)
        if self.budget_tokens is not None:
            share = {"head": 1, "layer": heads, "model": heads * layer.layers}[self.budget_per or "head"]
            tokens: int = of_layer(self.budget_tokens, layer.index)
            return self._enough(tokens / share, "budget_tokens", tokens)
        assert self.budget_bytes is not None
        batch = groups[0].rows["keys"].shape[0]
        fixed = 0 if layer.store.codec is None else layer.store.codec.fixed_nbytes()
        share = {"head": 1, "layer": heads, "model": heads * layer.layers}[self.budget_per or "model"]
        # The interval's entries are held too.
        entries = (self.budget_bytes / share / batch - fixed) / layer.store.entry_nbytes() - self.interval
        return self._enough(entries, "budget_bytes", self.budget_bytes)

    def _enough(self, entries: float, name: str, value: int) -> float:
        if entries < self.smallest:
            raise ValueError(
                f"{type(self).__name__}: {name}={value} comes to {max(0, int(entries))} entries per head; "
                f"it always keeps {self.smallest}"
            )
        return entries

    def room(self, layer: Any) -> int | None:
        """Entries of room beyond a fixed budget that decoding keeps to; None where heads go on growing."""
        fixed = not self.reads and (self.budget_tokens is not None or self.budget_bytes is not None)
        return self.interval if fixed and self.acts(decoding=True) else None

    def to_dict(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }


_LISTS = ("compression_ratio", "budget_tokens")


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def each(value: Any) -> list[Any]:
    """The numbers of a list, or the one number; none for None."""
    return list(value) if is_list(value) else [] if value is None else [value]


def of_layer(value: Any, index: int) -> Any:
    return value[index] if is_list(value) else value


def _check_storage(name: str, storage: Any) -> None:
    if storage is not None and not callable(getattr(storage, "codec", None)):
        raise ValueError(f"{name}: storage is Quantised(bits=4), Quantised(bits=8), ThinK() or none; got {storage!r}")
