"""What all attributions share: one pass under taps, the streams of tokens, the row that is asked about.

Legend: b batch, h heads, n queries, m keys. A stream is the tokens of one stack ("decoder", "encoder", "language",
"vision"); a step is one attention call, by which a stream reads itself or another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.feed import Feed, Position, Score, Target, logits_of, places, score_of, still
from manyheads.explain.attributions.grid import layout
from manyheads.hosts.calls import opened
from manyheads.hosts.sites import answering_stack, only_stack
from manyheads.hosts.taps import AttentionCall, Site, record, sites

Fuse = Literal["mean", "max", "min"]
FUSES = ("mean", "max", "min")
# [b, n], or one by the name of the stream where the model has several.
Attributed = Tensor | dict[str, Tensor]
# A site -> the stream that reads and the stream that is read.
Streams = Callable[[Site], tuple[str, str]]
# The growing list of calls -> hooks on the model while it runs.
Watch = Callable[[list[Any]], AbstractContextManager[Any]]
# Weights of one block in the pipeline of all heads: 2^20 float32 numbers are 4 MiB, which stay in a core's cache.
BLOCK = 2**20
BROKEN = "the model's numbers are broken (its weights, or an overflow of its dtype)"


@dataclass(frozen=True)
class Step:
    call: Any
    reader: str
    source: str


@dataclass(frozen=True)
class Trace:
    """One pass: its steps in their order (those of one group read at the same time), the output, each stream's real
    tokens [b, n], the streams that are the model's output."""

    feed: Feed
    output: Any
    groups: list[list[Step]]
    real: dict[str, Tensor]
    ends: list[str]
    # Whether the model's answer stands elsewhere: every token of the stream is read for it.
    inner: bool = False

    @property
    def steps(self) -> list[Step]:
        return [step for group in self.groups for step in group]

    @property
    def dtype(self) -> torch.dtype:
        double = any(step.call.output.dtype == torch.float64 for step in self.steps)
        return torch.float64 if double else torch.float32

    def last(self, stream: str) -> bool:
        """Whether the stream is causal, so that its last token is the one that has seen everything."""
        own = [step.call for step in self.steps if step.reader == step.source == stream]
        return stream == "decoder" or any(_causal(call) for call in own)

    def _pooled(self, stream: str) -> bool:
        """Whether the stream is a picture's, with no class token before the patches."""
        if self.last(stream):
            return False
        found = layout(self.feed, stream)
        return found is not None and found.first == 0

    def start(self, position: Position) -> dict[str, Tensor]:
        """One distribution over the tokens of each output stream, [b, n]: where the explanation starts. One token (by
        default the last of a causal stream, the first of any other), or the mean of all real ones."""
        found = {}
        for stream in self.ends:
            real = self.real[stream]
            if position is None and (self.inner or self._pooled(stream)):
                position = "mean"
            if isinstance(position, str):
                if position != "mean":
                    raise ValueError(f"position={position!r}: give an integer, one per row, 'mean' or nothing")
                found[stream] = real / real.sum(-1, keepdim=True)
                continue
            chosen = places(position, real, self.last(stream))
            if not bool(real.gather(1, chosen[:, None]).all()):
                raise ValueError(f"position {position} is padding in some row of the batch")
            found[stream] = nn.functional.one_hot(chosen, real.shape[1])
        return {stream: each.to(self.dtype) for stream, each in found.items()}

    def place(self, position: Position) -> Position:
        """Where logits [b, n, vocabulary] are read. Only a causal stream has a place of its own: its last token."""
        logits = logits_of(self.output)
        if self.inner:
            return None
        if position is None and logits is not None and logits.dim() == 3 and not self.last(self.ends[0]):
            raise ValueError(f"logits {list(logits.shape)} of a model that sees both sides: say which token, position=")
        tokens = self.real[self.ends[0]].shape[1]
        if logits is not None and logits.dim() == 3 and logits.shape[1] != tokens:
            raise ValueError(
                f"logits {list(logits.shape)} are not one for each of {tokens} tokens, so that no position is both a "
                "token's and an answer's: give score=, and position= for the token"
            )
        return position

    def finish(self, found: dict[str, Tensor]) -> Attributed:
        """Zero on padding; NaN is refused; a single stream stands alone."""
        found = {stream: each.masked_fill(~self.real[stream], 0) for stream, each in found.items()}
        broken = [stream for stream, each in found.items() if not bool(each.isfinite().all())]
        if broken:
            raise ValueError(f"attention of {', '.join(broken)} holds NaN or infinity: {BROKEN}")
        return next(iter(found.values())) if len(found) == 1 else found


# What was asked for and the pass that told it, of the methods of one comparison.
_shared: ContextVar[list[tuple[list[Any], Trace]] | None] = ContextVar("shared", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, a method that asks for the pass that ran last, of the same inputs and target, is given it. Inputs must
    not change meanwhile. One pass is held at a time, as long as no other is asked for."""
    token = _shared.set([])
    try:
        yield
    finally:
        _shared.reset(token)


class Attribution(ABC):
    """attribute(inputs, target=..., additional_forward_args=...) -> [b, n], one number per input token.

    model: any model that taps read. score: output -> one number per row, for models without logits. streams: which
    stream a site reads from which, where names do not tell; end: the stream that is the output. stack: the one stack
    whose self attention is read, and whose tokens are told of; by default all, or of a model that shows pictures to its
    text (LLaVA and its like) the language stack. position is one of that stack's; in a stack that is only read from,
    all tokens unless given.
    """

    # Whether the attribution explains a target, or only where attention goes.
    of_target = False

    def __init__(
        self,
        model: nn.Module,
        *,
        score: Score | None = None,
        streams: Streams | None = None,
        end: str | None = None,
        stack: str | None = None,
    ):
        self.model, self.score, self.streams, self.end, self.stack = model, score, streams, end, stack

    def attribute(
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        position: Position = None,
    ) -> Attributed:
        """inputs: token ids [b, n], pixel values, or a mapping of the model's inputs. target: a class, or a vocabulary
        id at the position (None: the last real token). Several streams give a dict by stream."""
        feed = Feed.of(self.model, inputs, additional_forward_args)
        with still(self.model):
            return self._attribute(feed, target, position)

    @abstractmethod
    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed: ...

    def trace(
        self, feed: Feed, target: Target, position: Position, gradients: bool = False, watch: Watch | None = None
    ) -> Trace:
        """Runs the model under taps. gradients: and back from the score, so that weights have theirs. watch: hooks that
        are there meanwhile, for which a pass of its own is needed."""
        held = _shared.get()
        if held is None or watch is not None:
            return self._run(feed, target, position, gradients, watch)
        own = [self.model, self.score, self.streams, self.end, self.stack]
        asked = [*own, target, position, gradients, *feed.named, *feed.named.values()]
        for known, trace in held:
            if len(known) == len(asked) and all(a is b for a, b in zip(known, asked, strict=True)):
                return trace
        held.clear()  # two passes take twice the memory
        held.append((asked, self._run(feed, target, position, gradients, watch)))
        return held[0][1]

    def _run(self, feed: Feed, target: Target, position: Position, gradients: bool, watch: Watch | None) -> Trace:
        where, inner = _where(self.model, self.stack)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradients))
            calls = stack.enter_context(record(self.model, gradients=gradients, **where))
            if watch is not None:
                stack.enter_context(watch(calls))
            output = feed.plain()
        trace = replace(_trace(feed, output, calls, self.streams or _streams(calls), self.end), inner=inner)
        if gradients or target is not None:
            asked = None if isinstance(position, str) else position
            place = trace.place(asked) if self.score is None else None
            score = score_of(output, feed, target, place, self.score)
            if gradients:
                _backward(score, calls)
        for step in trace.steps:
            _clean(step, trace.real)
        return trace


def _where(model: nn.Module, stack: str | None) -> tuple[dict[str, Any], bool]:
    """What is recorded, and whether that is a stack which another one's answer rests on."""
    answers = answering_stack(model)
    if stack is not None:
        own = only_stack(model, stack)
        return {"stack": own, "kind": "self"}, answers not in (None, own)
    crossing = any(site.kind == "cross" for site in sites(model) if site.stack == answers)
    return ({"stack": "language"} if answers == "language" and not crossing else {}), False


def check_layer(trace: Trace, layer: int) -> None:
    """ValueError for the number of a layer that several streams have; -1, the last, is meant of each."""
    streams = sorted({step.reader for step in trace.steps if step.reader == step.source})
    if layer != -1 and len(streams) > 1:
        raise ValueError(f"layer {layer}: there is one in each of {', '.join(streams)}: say which by stack=")


def _backward(score: Tensor, calls: list[Any]) -> None:
    if not bool(score.isfinite().all()):
        raise ValueError(f"the score holds NaN or infinity: {BROKEN}")
    for call in calls:
        opened(call, "gradients of weights")
    if not score.requires_grad:
        raise ValueError("the score does not depend on any attention output, so it has no gradient")
    score.sum().backward()
    for call in calls:
        if call.output.grad is None:  # a layer that the score does not see
            call.output.grad = torch.zeros_like(call.output)


def _clean(step: Step, real: dict[str, Tensor]) -> None:
    """What is read from here on needs no graph, and no numbers of padding: kernels may leave NaN there, which 0 * NaN
    would spread. NaN anywhere else is refused here, since some kernels turn it into zeros."""
    call = step.call
    if not isinstance(call, AttentionCall):
        return
    for name, stream in (("query", step.reader), ("key", step.source), ("value", step.source)):
        rows = getattr(call, name).detach()
        if not bool(real[stream].all()):
            rows = rows.masked_fill(~real[stream][:, None, :, None], 0)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"attention of {call.site.path} holds NaN or infinity: {BROKEN}")
        setattr(call, name, rows)
    if call.keeps_gradient and call.output.grad is not None and not bool(real[step.reader].all()):
        call.output.grad = call.output.grad.masked_fill(~real[step.reader][:, None, :, None], 0)


def _streams(calls: Sequence[Any]) -> Streams:
    stacks = {call.site.stack for call in calls}

    def name(site: Site) -> tuple[str, str]:
        if site.kind == "self":
            return site.stack, site.stack
        others = stacks - {site.stack}
        source = "encoder" if "encoder" in others else next(iter(others), "")
        if len(others) != 1 and source != "encoder":
            raise ValueError(f"{site.path} reads another stream, but which of {sorted(others)}? give streams=")
        return site.stack, source

    return name


def _trace(feed: Feed, output: Any, calls: list[Any], streams: Streams, end: str | None) -> Trace:
    groups: list[list[Step]] = []
    _check_once(calls)
    for call in calls:
        step = Step(call, *streams(call.site))
        before = groups[-1] if groups else []
        # Two streams that read each other, one call after the other, do so at the same time.
        mutual = len(before) == 1 and step.reader != step.source
        if mutual and (before[0].reader, before[0].source) == (step.source, step.reader):
            before.append(step)
        else:
            groups.append([step])
    steps = [step for group in groups for step in group]
    sizes: dict[str, int] = {}
    for step in steps:
        for stream, n in zip((step.reader, step.source), size(step.call), strict=True):
            if sizes.setdefault(stream, n) != n:
                raise ValueError(
                    f"{step.call.site.path} has {n} tokens where {stream} has {sizes[stream]}: attributions read "
                    "one pass over the whole input, without a cache and without merging of tokens"
                )
    read = {step.source for step in steps if step.reader != step.source}
    ends = [stream for stream in sizes if stream not in read] or [steps[0].reader]
    if end is not None:
        if end not in sizes:
            raise ValueError(f"end={end!r} is no stream of {type(feed.model).__name__}: {sorted(sizes)}")
        ends = [end]
    both = {"encoder", "decoder"} <= set(sizes)
    return Trace(feed, output, groups, {stream: feed.real(stream, n, both) for stream, n in sizes.items()}, ends)


def _check_once(calls: list[Any]) -> None:
    """ValueError for a layer that takes its one look in several calls, which would count as so many layers."""
    for one, other in pairwise(calls):
        alike = one.site is other.site and isinstance(one, AttentionCall) and isinstance(other, AttentionCall)
        if alike and one.query is other.query:
            raise ValueError(
                f"{one.site.path}: {type(one.site.module).__name__} attends with the same queries several times in a "
                "layer and joins the results itself: attributions read one call of each layer; record(model) gives all"
            )


def size(call: Any) -> tuple[int, int]:
    if isinstance(call, AttentionCall):
        return call.query.shape[2], call.key.shape[2]
    n, m = call.weights().shape[-2:]
    return n, m


def _causal(call: Any) -> bool:
    if not isinstance(call, AttentionCall):
        return bool(call.site.stack == "decoder")
    n = call.query.shape[2]
    if call.mask is None or n < 2 or call.mask.shape[2] != n:
        return call.causal
    ahead = call.mask.diagonal(1, -2, -1)
    seen = ahead if ahead.dtype == torch.bool else ahead > torch.finfo(ahead.dtype).min / 2
    return not bool(seen.any())


def check_fuse(fuse: str) -> None:
    if fuse not in FUSES:
        raise ValueError(f"fuse={fuse!r}: heads are fused by {', '.join(FUSES)}")


def fused(call: Any, rows: slice, fuse: str) -> Tensor:
    """[b, rows, m]: mean, max or min over the heads."""
    weights = call.weights(None, rows)
    if fuse == "mean":
        found: Tensor = weights.mean(1)
        return found
    return weights.amax(1) if fuse == "max" else weights.amin(1)


def blocks(call: Any, wanted: Tensor | None = None) -> list[slice]:
    """Rows in small blocks; with wanted [b, n], only where a row of it is not zero."""
    if not isinstance(call, AttentionCall):
        return [slice(0, call.weights().shape[2])]
    n, line = call.query.shape[2], call.query.shape[0] * call.heads * call.key.shape[2]
    step = max(1, min(n, BLOCK // max(1, line)))
    first, stop = 0, n
    if wanted is not None:
        used = (wanted != 0).any(0).nonzero()[:, 0]
        if not used.numel():
            return []
        first, stop = int(used[0]), int(used[-1]) + 1
    return [slice(at, min(stop, at + step)) for at in range(first, stop, step)]
