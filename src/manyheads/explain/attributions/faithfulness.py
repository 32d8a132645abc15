"""How far an attribution says what the model does: deletion, insertion, rank correlation with leave-one-out.

Deletion and insertion are Petsiuk, Das & Saenko's (RISE, arXiv 1806.07421), leave-one-out is as in arXiv 2005.00928.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.base import BROKEN, Attributed, Attribution, Trace, sharing
from manyheads.explain.attributions.feed import (
    Feed,
    Position,
    Score,
    Target,
    at_place,
    logits_of,
    per_row,
    places,
    said_of,
    still,
)
from manyheads.explain.attributions.feed import score_of as scored
from manyheads.explain.attributions.omitted import Omitted
from manyheads.explain.attributions.raw import RawAttention
from manyheads.hosts.positions import has_rope_index, packed, positions

REMOVALS = ("attention", "zero")
# Rows of one pass, however short: each has logits of the whole vocabulary.
_MOST_ROWS = 64


@dataclass(frozen=True)
class Curve:
    """fractions [s] of the tokens that are removed (or put back), the model's value at each, [b, s]."""

    fractions: list[float]
    values: list[list[float]]

    @property
    def auc(self) -> list[float]:
        """The area under each row's curve, by trapezoids."""
        steps = list(zip(self.fractions, self.fractions[1:], strict=False))
        return [
            sum((right - left) * (row[i] + row[i + 1]) / 2 for i, (left, right) in enumerate(steps))
            for row in self.values
        ]


class Removal:
    """A model's value with some of its tokens taken away.

    The value is what the model says of the target, its probability or a regression's number (logits=True: its logit),
    or what `score` gives. remove="attention": the
    token is masked as padding is, so no other token sees it; positions stay. remove="zero": its embedding, or its patch
    of the picture, is zero. By default "attention" where the model takes an attention_mask. Never removed: padding, the
    token whose row is explained (an encoder-decoder's last encoder token, so that there is something to read), and what
    stands beside a picture's patches.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        position: Position = None,
        score: Score | None = None,
        remove: str | None = None,
        batch_size: int = 16,
    ):
        self.feed, self.score, self.batch_size = Feed.of(model, inputs, additional_forward_args), score, batch_size
        with still(model):
            trace = RawAttention(model, score=score).trace(self.feed, target, position)
        self.picture = self.feed.main == "pixel_values"
        self.stream = "encoder" if {"encoder", "decoder"} <= set(trace.real) else next(iter(trace.real))
        if len(trace.real) > 1 and self.stream != "encoder":
            raise ValueError(f"faithfulness is measured on one stream of tokens; this model has {sorted(trace.real)}")
        self.remove = remove or ("zero" if self.picture or not self.feed.takes("attention_mask") else "attention")
        if self.remove not in REMOVALS or (self.remove == "attention" and not self.feed.takes("attention_mask")):
            raise ValueError(f"remove={remove!r}: 'zero', or 'attention' where the model takes an attention_mask")
        if self.remove == "attention":
            if packed(self.feed.named):
                raise ValueError(
                    "several texts are packed into a row, which a mask over its tokens would join: give each text a "
                    "row of its own, or remove='zero'"
                )
            self.feed = self._in_place()
        self.target = target if target is None else per_row(target, self.feed.rows, "target", self.feed.device)
        self.position = self._fixed(trace, position)
        self.removable = self._removable(trace, position)
        # A causal stream of its own: whatever is masked there is seen by nobody.
        self._causal = self.stream in trace.ends and trace.last(self.stream) and self.remove == "attention"
        self._short: dict[int, Omitted | None] = {}
        self._known: dict[tuple[int, bool, bytes], float] = {}

    def _in_place(self) -> Feed:
        """The feed with its tokens' places written down, since some models count them over the mask."""
        feed = self.feed
        if has_rope_index(feed.model):
            raise ValueError(
                f"{type(feed.model).__name__} finds its tokens' places from the mask, in several dimensions: a token "
                "that is masked would move the others; faithfulness cannot be measured on it"
            )
        at = positions(feed.model, feed.named)
        return feed if at is None else Feed(feed.model, {**feed.named, "position_ids": at})

    def _fixed(self, trace: Trace, position: Position) -> Position:
        """The place of the logits, fixed before any mask changes."""
        logits = logits_of(trace.output)
        if self.score is not None or logits is None or logits.dim() == 2:
            return None
        real = trace.real[trace.ends[0]]
        return places(trace.place(position), real, last=True)

    def _removable(self, trace: Trace, position: Position) -> Tensor:
        real = trace.real[self.stream].clone()
        n = real.shape[1]
        if self.picture:
            patches = self.feed.patches
            if n != patches.tokens:
                raise ValueError(f"{type(self.feed.model).__name__} attends with {n} tokens, not {patches.tokens}")
            real[:, : patches.first] = real[:, patches.stop :] = False
            return real
        own = self.stream in trace.ends
        at = None if isinstance(position, str) or not own else position
        kept = places(at, real, last=trace.last(self.stream) if own else True)
        real[torch.arange(real.shape[0], device=real.device), kept] = False
        return real

    def values(self, row: int, keep: Tensor, logits: bool = False) -> Tensor:
        """[k]: the value of one row of the batch under each of keep [k, n], True = stays; each kind of row once."""
        names = [(row, logits, bytes(own)) for own in keep.to(torch.uint8).cpu().numpy()]
        new = {name: own for name, own in zip(names, keep, strict=True) if name not in self._known}
        if new:
            found = self._computed(row, torch.stack(list(new.values())), logits)
            self._known |= dict(zip(new, found.tolist(), strict=True))
        return torch.tensor([self._known[name] for name in names], dtype=torch.float64, device=keep.device)

    def _computed(self, row: int, keep: Tensor, logits: bool) -> Tensor:
        """Rows of like length side by side: where masked tokens are left out, a batch is as long as its longest."""
        one, found = self.feed.row(row), torch.empty(len(keep), dtype=torch.float64)
        n = keep.shape[1]
        with torch.no_grad(), still(self.feed.model):
            short = self._omitting(one, row)
            length = torch.full((len(keep),), n) if short is None else keep.sum(1).cpu()
            order = length.argsort(stable=True)
            for some in _batches(length[order].tolist(), self.batch_size * n):
                part = order[some]
                if short is not None:
                    own = self._of_logits(short.logits(keep[part]), row, logits)
                else:
                    feed = self._without(one, keep[part])
                    own = self._value(self._output(feed), feed, row, logits)
                found[part] = own.double().cpu()
        if not bool(found.isfinite().all()):
            raise ValueError(f"{type(self.feed.model).__name__} without some tokens gives NaN or infinity: {BROKEN}")
        return found

    def _omitting(self, one: Feed, row: int) -> Omitted | None:
        if row not in self._short:
            self._short[row] = None
            if self._causal and self.score is None and isinstance(self.position, Tensor):
                keep = torch.ones_like(self.removable[row : row + 1])
                keep[0, self.removable[row].nonzero()[::2, 0]] = False
                at = int(self.position[row])

                def whole(keep: Tensor) -> Tensor:
                    feed = self._without(one, keep)
                    given = logits_of(self._output(feed))
                    assert given is not None
                    return at_place(given, feed, at)

                self._short[row] = Omitted.of(one, at, keep, whole)
        return self._short[row]

    @staticmethod
    def _output(feed: Feed) -> Any:
        return feed.plain()

    def _of_logits(self, given: Tensor, row: int, logits: bool) -> Tensor:
        """Of logits at the place [k, outputs]."""
        if self.target is None:
            raise ValueError(f"which of the {given.shape[-1]} outputs is to be explained? give target=")
        return (given if logits else said_of(self.feed.model, given))[:, int(self.target[row])]

    def _value(self, output: Any, feed: Feed, row: int, logits: bool) -> Tensor:
        if self.score is not None or logits:
            target = None if self.target is None else int(self.target[row])
            return scored(output, feed, target, self._at(row), self.score)
        given = logits_of(output)
        assert given is not None
        return self._of_logits(at_place(given, feed, self._at(row)), row, logits)

    def _at(self, row: int) -> Position:
        return int(self.position[row]) if isinstance(self.position, Tensor) else None

    def _without(self, one: Feed, keep: Tensor) -> Feed:
        k, name = keep.shape[0], one.main
        if self.remove == "attention":
            mask = one.named.get("attention_mask")
            base = torch.ones_like(keep[:1], dtype=torch.long) if mask is None else mask
            return one.repeated(k, {"attention_mask": base * keep.to(base.dtype)})
        whole = one.embeddings()[name] if name == "input_ids" else one.named[name]
        share = keep.to(whole.dtype)
        if self.picture:
            covered = self.feed.patches.pixels(self.feed.patches.grid(share))
            high, wide = covered.shape[1:]
            share = whole.new_ones(k, 1, *whole.shape[-2:])
            share[:, 0, :high, :wide] = covered
        else:
            share = share[..., None]
        if name == "input_ids":
            return replace(one.repeated(k, {}), vectors={name: whole * share})
        return one.repeated(k, {name: whole * share})

    def curve(self, attribution: Attributed, insert: bool, steps: int) -> Curve:
        """Removes tokens, most important first, in so many steps; or puts them back, after all are gone."""
        order_of = self.own(attribution)
        if steps < 1:
            raise ValueError(f"steps={steps}: a curve needs at least one")
        rows = range(self.feed.rows)
        values = [self.values(row, self._stages(row, order_of[row], insert, steps)).tolist() for row in rows]
        return Curve([step / steps for step in range(steps + 1)], values)

    def look_up(self, attributions: Sequence[Attributed], steps: int) -> None:
        """Computes what curves of these attributions ask for, all together: later each finds its values known."""
        for row in range(self.feed.rows):
            asked = [
                self._stages(row, self.own(own)[row], insert, steps) for own in attributions for insert in (False, True)
            ]
            if asked:
                self.values(row, torch.cat(asked))

    def _stages(self, row: int, values: Tensor, insert: bool, steps: int) -> Tensor:
        """[steps + 1, n]: what stays at every step of a row's curve."""
        free = self.removable[row].nonzero()[:, 0]
        order = free[values[free].argsort(descending=True, stable=True)]
        keep = torch.ones(steps + 1, self.removable.shape[1], dtype=torch.bool, device=order.device)
        if insert:
            keep[:, order] = False
        for step in range(steps + 1):
            keep[step, order[: round(step * len(order) / steps)]] = insert
        return keep

    def leave_one_out(self, sample: int | None = None) -> Tensor:
        """[b, n]: what the value loses when one token goes, in logits; 0 where none may go. sample: so many tokens of a
        row, drawn by chance, and NaN for those not drawn."""
        found = torch.zeros(self.removable.shape, dtype=torch.float64, device=self.removable.device)
        draw = torch.Generator().manual_seed(0)
        for row in range(self.feed.rows):
            free = self.removable[row].nonzero()[:, 0]
            if sample is not None and sample < len(free):
                found[row, free] = torch.nan
                free = free[torch.randperm(len(free), generator=draw)[:sample].to(free.device)]
            keep = torch.ones(len(free) + 1, self.removable.shape[1], dtype=torch.bool, device=free.device)
            keep[torch.arange(1, len(free) + 1), free] = False
            values = self.values(row, keep, logits=True)
            found[row, free] = values[0] - values[1:]
        return found

    def own(self, attribution: Attributed) -> Tensor:
        """The stream that tokens are removed from, of an attribution."""
        given = attribution[self.stream] if isinstance(attribution, Mapping) else attribution
        if given.shape != self.removable.shape:
            raise ValueError(f"the attribution is {list(given.shape)}; the tokens are {list(self.removable.shape)}")
        if not bool(given.isfinite().all()):
            raise ValueError("the attribution holds NaN or infinity")
        return given


def deletion_curve(
    model: nn.Module, inputs: Any, attribution: Attributed, target: Target = None, *, steps: int = 20, **options: Any
) -> Curve:
    """The target's probability as the tokens that are called most important are removed first: a faithful attribution
    lets it fall soon, so a small area is good. options: Removal's."""
    return Removal(model, inputs, target, **options).curve(attribution, False, steps)


def insertion_curve(
    model: nn.Module, inputs: Any, attribution: Attributed, target: Target = None, *, steps: int = 20, **options: Any
) -> Curve:
    """The same from nothing, putting the most important tokens back first: a large area is good."""
    return Removal(model, inputs, target, **options).curve(attribution, True, steps)


def leave_one_out(model: nn.Module, inputs: Any, target: Target = None, **options: Any) -> Tensor:
    """[b, n]: the target's logit less that without the token; 0 for tokens that are never removed (see Removal)."""
    return Removal(model, inputs, target, **options).leave_one_out()


def rank_correlation(attribution: Tensor, reference: Tensor, counted: Tensor | None = None) -> list[float]:
    """Spearman's rank correlation of each row's tokens (counted [b, n]: which); NaN where either is constant."""
    from scipy.stats import spearmanr

    found = []
    for row in range(attribution.shape[0]):
        chosen = slice(None) if counted is None else counted[row]
        a, b = (each[row][chosen].double().cpu().numpy() for each in (attribution, reference))
        flat = len(a) < 2 or (a == a[0]).all() or (b == b[0]).all()
        found.append(math.nan if flat else float(spearmanr(a, b).statistic))
    return found


@dataclass(frozen=True)
class Faithfulness:
    """One method, means over the batch. deletion: small is good; insertion and correlation: large. seconds: of the
    attribution; a pass that several methods read counts where it ran."""

    method: str
    deletion: float
    insertion: float
    correlation: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """rows: one per method, in the order asked for. refused: method -> why this model cannot have it."""

    rows: list[Faithfulness]
    refused: dict[str, str]
    remove: str
    steps: int
    attributions: dict[str, Tensor] = field(repr=False)
    leave_one_out: Tensor = field(repr=False)
    sample: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, fit for JSON; NaN as None."""
        rows = [{key: None if value != value else value for key, value in asdict(row).items()} for row in self.rows]
        tokens = {name: own.tolist() for name, own in self.attributions.items()}
        alone = [[None if value != value else value for value in row] for row in self.leave_one_out.tolist()]
        return {
            "rows": rows, "refused": self.refused, "remove": self.remove, "steps": self.steps,
            "attributions": tokens, "sample": self.sample, "leave_one_out": alone,
        }  # fmt: skip


def compare_attributions(
    model: nn.Module,
    inputs: Any,
    target: Target = None,
    methods: Sequence[str | Attribution] | None = None,
    *,
    additional_forward_args: Any = None,
    position: Position = None,
    score: Score | None = None,
    remove: str | None = None,
    steps: int = 20,
    sample: int | None = None,
    batch_size: int = 16,
) -> Comparison:
    """Attributions of one input by several methods, with the faithfulness of each.

    methods: names out of METHODS or Attribution objects; None: all, and those that the model cannot have are told in
    `refused` instead of raised. sample: correlate over so many tokens of a row, drawn by chance, each of which takes a
    pass; None: over all. "random" is an order by chance, the floor that a method has to beat.
    """
    named = _named(model, methods, score)
    if steps < 1:
        raise ValueError(f"steps={steps}: a curve needs at least one")
    if sample is not None and sample < 2:
        raise ValueError(f"sample={sample}: ranks are correlated over at least 2 tokens, or None for all")
    refused, attributions, seconds = {}, {}, {}
    with sharing():
        removal = Removal(
            model, inputs, target, additional_forward_args,
            position=position, score=score, remove=remove, batch_size=batch_size,
        )  # fmt: skip
        for name, method in named.items():
            start = time.perf_counter()
            try:
                attributions[name] = removal.own(
                    method.attribute(inputs, target, additional_forward_args, position=position)
                )
            except ValueError as error:
                if methods is not None:
                    raise
                refused[name] = str(error)
            seconds[name] = time.perf_counter() - start
    reference = removal.leave_one_out(sample)
    counted = removal.removable & reference.isfinite()
    removal.look_up(list(attributions.values()), steps)
    rows = []
    for name, given in attributions.items():
        deletion = removal.curve(given, False, steps).auc
        insertion = removal.curve(given, True, steps).auc
        correlation = rank_correlation(given, reference, counted)
        rows.append(Faithfulness(name, _mean(deletion), _mean(insertion), _mean(correlation), seconds[name]))
    return Comparison(rows, refused, removal.remove, steps, attributions, reference, sample)


def _batches(lengths: Sequence[int], room: int) -> Iterator[slice]:
    """Slices of ascending lengths that take no more than so many tokens, padded to their last."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        last = stop == len(lengths)
        if last or stop - start == _MOST_ROWS or (stop + 1 - start) * lengths[stop] > room:
            yield slice(start, stop)
            start = stop


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _named(
    model: nn.Module, methods: Sequence[str | Attribution] | None, score: Score | None
) -> dict[str, Attribution]:
    from manyheads.explain.attributions import METHODS

    named: dict[str, Attribution] = {}
    for method in METHODS if methods is None else methods:
        if isinstance(method, str):
            if method not in METHODS:
                raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
            named[method] = METHODS[method](model, score)
        elif isinstance(method, Attribution):
            name, number = type(method).__name__, 1
            while (own := name if number == 1 else f"{name} {number}") in named:
                number += 1
            named[own] = method
        else:
            raise ValueError(f"{method!r} is no method: give a name or an Attribution")
    if not named:
        raise ValueError("no methods to compare")
    return named
