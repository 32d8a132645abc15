"""Path patching: which heads send what other heads, or the answer, rest on; and how far two tasks share a circuit.

For an input x and a changed one x', sender s and receivers R:
    1. x and x' are run, every head's output kept
    2. x again, heads frozen to their outputs on x, s to its output on x'; R's queries, keys and values are kept
    3. x again, nothing frozen, R's queries, keys or values as kept: effect = metric of this pass - metric on x
With no receivers the answer itself receives: effect = metric of pass 2, the direct effect. MLPs and norms are computed
anew in pass 2, so that what s writes reaches R directly or through them, not through other heads.
Source: Goldowsky-Dill et al. arXiv 2304.05969, Wang et al. arXiv 2211.00593, as in Merullo et al. arXiv 2310.08744
(GPT-2 medium; the most important 2% of heads per stage are a circuit, and two tasks share about 78% of them).
x and x' have the same length, so that positions meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.feed import Feed, still
from manyheads.explain.detectors.subject import Subject
from manyheads.hosts.attend import Scoring
from manyheads.hosts.calls import opened
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import AttentionCall, tap

Head = tuple[int, int]
# The model's output -> one number per row [b], or one number.
Metric = Callable[[Any], Tensor]
INPUTS = ("query", "key", "value")


def logit_difference(right: int | Tensor, wrong: int | Tensor, position: int = -1) -> Metric:
    """logit[right] - logit[wrong] at a position, per row."""

    def metric(output: Any) -> Tensor:
        logits = (output if isinstance(output, Tensor) else output.logits)[:, position]
        b = logits.shape[0]
        chosen = [torch.as_tensor(token, device=logits.device).expand(b)[:, None] for token in (right, wrong)]
        found: Tensor = (logits.gather(1, chosen[0]) - logits.gather(1, chosen[1]))[:, 0]
        return found

    return metric


@dataclass(frozen=True)
class Patched:
    """effects [layers, heads] of each sender, in the metric's unit (0 where a sender cannot reach a receiver);
    clean, corrupted: the metric on both inputs."""

    effects: Tensor
    clean: float
    corrupted: float

    @property
    def share(self) -> Tensor:
        """Of the whole way from clean (0) to corrupted (1)."""
        way = self.corrupted - self.clean
        if way == 0:
            raise ValueError("the metric is the same on both inputs: there is no way to have a share of")
        return self.effects / way

    def top(self, k: int) -> list[Head]:
        """The k heads of greatest effect, either sign."""
        heads = self.effects.shape[1]
        order = self.effects.abs().flatten().sort(descending=True, stable=True).indices[:k]
        return [(int(i) // heads, int(i) % heads) for i in order]


class PathPatching:
    """One pair of inputs (a mapping, or ids [b, n]) and a metric; `effects(receivers)` may be asked again and again."""

    def __init__(self, model: nn.Module | Loaded, clean: Any, corrupted: Any, metric: Metric, stack: str | None = None):
        self.subject, self.metric = Subject(model, stack), metric
        self._feeds = [Feed.of(self.subject.model, inputs) for inputs in (clean, corrupted)]
        shapes = [list(feed.named[feed.main].shape) for feed in self._feeds]
        if shapes[0] != shapes[1]:
            raise ValueError(f"clean and corrupted inputs are {shapes[0]} and {shapes[1]}: give them the same length")
        kept = [self._kept(feed) for feed in self._feeds]
        (self.clean, self._clean), (self.corrupted, self._corrupted) = kept

    @property
    def heads(self) -> int:
        return max(output.shape[1] for output in self._clean.values())

    def effects(
        self,
        receivers: Sequence[Head] | None = None,
        *,
        inputs: Sequence[str] = INPUTS,
        senders: Sequence[Head] | None = None,
    ) -> Patched:
        """receivers: heads, or None for the answer. inputs: which of a receiver's query, key and value are patched.
        senders: all heads before the last receiver unless given."""
        wrong = [name for name in inputs if name not in INPUTS]
        if wrong or not inputs or (receivers is not None and not receivers):
            raise ValueError(
                f"inputs={list(inputs)}, receivers={receivers}: patch some of {', '.join(INPUTS)} of some heads"
            )
        every = [(layer, head) for layer, own in self._clean.items() for head in range(own.shape[1])]
        for named in [*(receivers or ()), *(senders or ())]:
            if tuple(named) not in every:
                raise ValueError(f"there is no head {named}: {self.subject.layers} layers of {self.heads} heads")
        found = torch.zeros(self.subject.layers, self.heads, dtype=torch.float64)
        last = self.subject.layers if receivers is None else max(layer for layer, _ in receivers)
        for layer, head in every if senders is None else senders:
            if layer < last:
                found[layer, head] = self._effect((layer, head), receivers, inputs) - self.clean
        return Patched(found, self.clean, self.corrupted)

    def estimates(self, *, direct: bool) -> Tensor:
        """[layers, heads]: every sender's effect to first order, <slope of the metric by the head's output, its
        output on the corrupted input less that on the clean one>, from one pass and its way back (attribution
        patching, Nanda 2023; Syed et al. arXiv 2310.10348). direct: on the answer with all other heads frozen; else
        through everything behind it. A screen: `effects` of the greatest of them is exact."""
        bumps: dict[int, Tensor] = {}

        def bumped(call: Any) -> Tensor:
            base = self._clean[call.layer] if direct else call.output
            bumps[call.layer] = torch.zeros_like(base, requires_grad=True)
            return base + bumps[call.layer]

        model, feed = self.subject.model, self._feeds[0]
        with torch.enable_grad(), still(model), tap(model, bumped, stack=self.subject.stack, kind="self"):
            found = self.metric(feed(use_cache=False) if feed.takes("use_cache") else feed()).mean()
            slopes = torch.autograd.grad(found, list(bumps.values()))
        out = torch.zeros(self.subject.layers, self.heads, dtype=torch.float64)
        for layer, slope in zip(bumps, slopes, strict=True):
            way = self._corrupted[layer] - self._clean[layer]
            out[layer, : slope.shape[1]] = (slope * way).double().sum((0, 2, 3)).cpu()
        return out

    def _effect(self, sender: Head, receivers: Sequence[Head] | None, inputs: Sequence[str]) -> float:
        by_layer: dict[int, list[int]] = {}
        for layer, head in receivers or ():
            by_layer.setdefault(layer, []).append(head)
        kept: dict[Head, dict[str, Tensor]] = {}

        def frozen(call: Any) -> Tensor:
            for head in by_layer.get(call.layer, ()):
                kept[call.layer, head] = {name: of_head(call, name, head) for name in INPUTS}
            own = self._clean[call.layer]
            if call.layer != sender[0]:
                return own
            return own.index_copy(1, _index(own, sender[1]), self._corrupted[call.layer][:, sender[1] : sender[1] + 1])

        metric = self._run(self._feeds[0], frozen)
        if receivers is None:
            return metric

        def patched(call: Any) -> Tensor | None:
            heads = by_layer.get(call.layer)
            if not heads:
                return None
            new = [_attend(call, head, {name: kept[call.layer, head][name] for name in inputs}) for head in heads]
            found: Tensor = call.replaced(torch.cat(new, 1), heads)
            return found

        return self._run(self._feeds[0], patched)

    def _kept(self, feed: Feed) -> tuple[float, dict[int, Tensor]]:
        outputs: dict[int, Tensor] = {}

        def keep(call: Any) -> None:
            outputs[call.layer] = opened(call, "path patching").output

        metric = self._run(feed, keep)
        return metric, dict(sorted(outputs.items()))

    def _run(self, feed: Feed, reader: Callable[[Any], Tensor | None]) -> float:
        model = self.subject.model
        with torch.no_grad(), still(model), tap(model, reader, stack=self.subject.stack, kind="self"):
            found = self.metric(feed(use_cache=False) if feed.takes("use_cache") else feed())
        if not bool(found.isfinite().all()):
            raise ValueError("the metric gave NaN or infinity")
        return float(found.double().mean())


def of_head(call: AttentionCall, name: str, head: int) -> Tensor:
    """A head's own queries, keys or values, [b, 1, n, d]."""
    if name == "query":
        return call.query[:, head : head + 1]
    return call.of_heads(getattr(call, name), [head])


def _index(like: Tensor, head: int) -> Tensor:
    return torch.tensor([head], device=like.device)


def _attend(call: AttentionCall, head: int, given: dict[str, Tensor]) -> Tensor:
    """The head's output [b, 1, n, e] with these in place of its own queries, keys or values."""
    rows = [given.get(name, of_head(call, name, head)) for name in INPUTS]
    scoring, mask = call.scoring, call.mask
    sinks = None if scoring.sinks is None else scoring.sinks[head : head + 1]
    if mask is not None and mask.shape[1] != 1:
        mask = mask[:, head : head + 1]
    own = AttentionCall(
        call.site, rows[0], rows[1], rows[2], mask, call.causal, Scoring(scoring.scale, scoring.softcap, sinks)
    )
    own.output = call.output[:, head : head + 1]
    return own.mix(lambda weights, _: weights)


def path_patching(
    model: nn.Module | Loaded,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    receivers: Sequence[Head] | None = None,
    inputs: Sequence[str] = INPUTS,
    senders: Sequence[Head] | None = None,
    stack: str | None = None,
) -> Patched:
    """Effect of every sender on the receivers (None: on the answer), in one call."""
    return PathPatching(model, clean, corrupted, metric, stack).effects(receivers, inputs=inputs, senders=senders)


def circuit(
    patching: PathPatching, *, stages: int = 2, share: float = 0.02, least: float = 0.0, screen: int | None = None
) -> list[list[Head]]:
    """Heads by stage: those that reach the answer, then those that reach these, and so on. share: of all heads, per
    stage, at least one. least: effects up to this share of the way from clean to corrupted count as none. screen: only
    so many heads per stage are patched, those of greatest first-order effect; None: all."""
    if screen is not None and screen < 1:
        raise ValueError(f"screen={screen}: at least one head is patched per stage")
    if stages < 1 or not 0 < share <= 1:
        raise ValueError(f"stages={stages}, share={share}: at least one stage, a share of 0 to 1")
    count = max(1, round(share * patching.subject.layers * patching.heads))
    found: list[list[Head]] = []
    receivers: list[Head] | None = None
    for _ in range(stages):
        senders = None if screen is None else _screened(patching, screen, receivers)
        effects = patching.effects(receivers, senders=senders)
        line = least * abs(effects.corrupted - effects.clean)
        own = [head for head in effects.top(count) if abs(float(effects.effects[head])) > line]
        if not own:
            break
        found.append(own)
        receivers = own
    return found


def _screened(patching: PathPatching, count: int, receivers: list[Head] | None) -> list[Head]:
    """The most promising senders, before the last receiver."""
    found = Patched(patching.estimates(direct=receivers is None), patching.clean, patching.corrupted)
    last = patching.subject.layers if receivers is None else max(layer for layer, _ in receivers)
    every = found.top(found.effects.numel())
    return [head for head in every if head[0] < last and head not in (receivers or ())][:count]


@dataclass(frozen=True)
class Overlap:
    """shared: heads in both. jaccard: shared / either. share: shared / the smaller circuit."""

    shared: list[Head]
    jaccard: float
    share: float


def circuit_overlap(first: Iterable[Any], second: Iterable[Any]) -> Overlap:
    """first, second: heads (layer, head), or stages of them as `circuit` gives."""
    one, two = _flat(first), _flat(second)
    if not one or not two:
        raise ValueError("a circuit without heads overlaps with nothing: ask for more of them (share=, least=)")
    both = one & two
    return Overlap(sorted(both), len(both) / len(one | two), len(both) / min(len(one), len(two)))


def _flat(heads: Iterable[Any]) -> set[Head]:
    found: set[Head] = set()
    for each in heads:
        pairs = [each] if len(each) == 2 and all(isinstance(part, int) for part in each) else each
        found |= {(int(layer), int(head)) for layer, head in pairs}
    return found
