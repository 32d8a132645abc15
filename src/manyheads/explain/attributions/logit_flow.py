"""Logit flow: what every source token adds to a logit through the heads that read it (after arXiv 2502.10835)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.base import Attributed, Attribution, Trace, blocks
from manyheads.explain.attributions.feed import Feed, Position, Target, per_row, places, still
from manyheads.explain.attributions.frozen import Frozen, freeze, is_norm
from manyheads.explain.attributions.writes import Write, writes
from manyheads.hosts.calls import opened
from manyheads.hosts.sites import answering_stack, choose
from manyheads.hosts.taps import AttentionCall


@dataclass(frozen=True)
class LogitParts:
    """A logit (before any soft cap) as a sum: heads [b, layers, h, n] by source token, embedding [b], mlps [b, layers],
    bias [b]; logit [b] as the model gave it. Of layers that have fewer heads than others the rest are zero."""

    heads: Tensor
    embedding: Tensor
    mlps: Tensor
    bias: Tensor
    logit: Tensor

    @property
    def tokens(self) -> Tensor:
        """[b, n], through all heads of all layers."""
        return self.heads.sum((1, 2))

    @property
    def total(self) -> Tensor:
        return self.heads.sum((1, 2, 3)) + self.embedding + self.mlps.sum(1) + self.bias


class LogitFlow(Attribution):
    """a_j = sum_{l,h} A^{l,h}[p, j] (v_j^{l,h} W_o^{l,h}) . d, d = the target's unembedding row pulled back through the
    final norm, whose statistics are held at their values of this pass.

    With the embedding's and the MLPs' terms and the biases it is the logit, exactly (`decompose`). Yu, Belinkov &
    Ananiadou trace the growth of log p(target) by single neurons, and on from position to position down the layers;
    here it is the logit itself (linear, so that parts add up), by head and source position, in one step: what reaches
    p's logit directly, not what upper layers make of it. Norms on a layer's writes (Gemma 2, OLMo 2) are held as well.

    against: another vocabulary id, or "mean" of all, whose unembedding is taken from the target's. For causal language
    models that add their layers to a residual stream; refused where adding up does not give their own hidden states.
    """

    of_target = True

    def __init__(self, model: nn.Module, *, against: int | str | None = None, **shared: Any):
        super().__init__(model, **shared)
        self.against = against

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        parts, trace = self._decompose(feed, target, position)
        return trace.finish({trace.ends[0]: parts.tokens})

    def decompose(
        self, inputs: Any, target: Target, additional_forward_args: Any = None, *, position: Position = None
    ) -> LogitParts:
        with still(self.model):
            return self._decompose(Feed.of(self.model, inputs, additional_forward_args), target, position)[0]

    def _decompose(self, feed: Feed, target: Target, position: Position) -> tuple[LogitParts, Trace]:
        head = _unembedding(self.model)
        if isinstance(position, str) or target is None:
            raise ValueError("logit flow needs target=, a vocabulary id, and one position per row")
        tokens = feed.named.get("input_ids", feed.named[feed.main])
        at = places(position, feed.real("decoder", tokens.shape[1], False), last=True)
        seen = _Seen(at)
        found: dict[int, Write] = {}

        @contextmanager
        def watch(calls: list[Any]) -> Iterator[None]:
            with writes(self.model, calls, found), _watching(self.model, head, seen):
                yield

        trace = self.trace(feed, target, at, watch=watch)
        with torch.no_grad():
            return _Sum(self, trace, found, seen, head, trace.start(at)).parts(target), trace


@dataclass
class _Seen:
    """What passed at the asked position: [b, e] each."""

    at: Tensor
    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    # Per layer: module, its first input, its output.
    inside: list[list[tuple[nn.Module, Tensor, Tensor]]] = field(default_factory=list)
    outside: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)
    head: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def row(self, given: Any) -> Tensor | None:
        given = given[0] if isinstance(given, tuple | list) and given else given
        if not isinstance(given, Tensor) or given.dim() != 3 or given.shape[0] != self.at.shape[0]:
            return None
        if given.shape[1] <= int(self.at.max()):
            return None
        return given[torch.arange(given.shape[0], device=given.device), self.at]


@contextmanager
def _watching(model: nn.Module, head: nn.Module, seen: _Seen) -> Iterator[None]:
    layers = _layers(model)

    def one_stream(given: Any) -> Tensor:
        row = seen.row(given)
        if row is None:
            raise ValueError(
                f"{type(model).__name__}: its layers do not hand on one residual stream [b, n, dim], whose parts logit "
                "flow adds up; another attribution may do without"
            )
        return row

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.entered.append(one_stream(args[0] if args else kwargs.get("hidden_states")))
        seen.inside.append([])

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.left.append(one_stream(output))

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, gave = seen.row(args[0] if args else kwargs.get("hidden_states")), seen.row(output)
        if given is None or gave is None:
            return
        if module is head:
            seen.head.append((given, gave))
            return
        within = len(seen.left) < len(seen.entered)
        (seen.inside[-1] if within else seen.outside).append((module, given, gave))

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for module in model.modules():
            if module not in layers:
                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        for layer in layers:
            stack.callback(layer.register_forward_hook(leave).remove)
        yield


def _layers(model: nn.Module) -> list[nn.Module]:
    """The members of the longest list of modules that attend for the answer: the stack of layers."""
    own = {site.module for site in choose(model, None, answering_stack(model), "self")}
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and not own.isdisjoint(module.modules())
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers: logit flow needs a residual stream of them")
    return max(lists, key=len)


def _unembedding(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = getattr(model, "config", None)
    if not isinstance(head, nn.Linear) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is no causal language model: logit flow needs its unembedding matrix")
    return head


class _Sum:
    """Puts the parts together and checks at every layer that they are what the model itself added."""

    def __init__(
        self, method: LogitFlow, trace: Trace, found: dict[int, Write], seen: _Seen, head: Any, start: dict[str, Tensor]
    ):
        self.method, self.trace, self.writes, self.seen, self.head = method, trace, found, seen, head
        self.calls = [step.call for step in trace.steps]
        self.start = next(iter(start.values()))
        if len(trace.real) != 1 or len(self.calls) != len(seen.entered) or not seen.head:
            raise ValueError(f"{self.name}: logit flow needs one attention call in every layer of one stream")

    @property
    def name(self) -> str:
        return type(self.method.model).__name__

    def parts(self, target: Target) -> LogitParts:
        seen = self.seen
        direction, logit, constant = self._direction(target)
        norm = self._final()
        pulled = direction if norm is None else norm.back(direction)
        bias = constant + (0 if norm is None else direction @ norm.bias)
        heads, mlps = [], []
        for layer in range(len(self.calls)):
            if layer and not _same(seen.entered[layer], seen.left[layer - 1]):
                raise ValueError(f"{self.name}: layer {layer} does not read what layer {layer - 1} gave")
            write, post = self._write(layer)
            towards = pulled if post is None else post.back(pulled)
            bias = bias + (0 if post is None else pulled @ post.bias)
            own = self.writes[layer]
            bias = bias + (0 if own.bias is None else towards @ own.bias)
            heads.append(self._heads(self.calls[layer], own, towards))
            mlps.append(((seen.left[layer] - seen.entered[layer] - write) * pulled).sum(-1))
        embedding = (seen.entered[0] * pulled).sum(-1)
        most = max(own.shape[1] for own in heads)
        heads = [nn.functional.pad(own, (0, 0, 0, most - own.shape[1])) for own in heads]
        return LogitParts(torch.stack(heads, 1), embedding, torch.stack(mlps, 1), bias, logit)

    def _direction(self, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """Unembedding [b, e], the logit it stands for [b], the head's bias [b]."""
        table, outputs = self.head.weight.detach(), self.seen.head[-1][1]
        offsets = table.new_zeros(table.shape[0]) if self.head.bias is None else self.head.bias.detach()
        chosen = per_row(target, outputs.shape[0], "target", outputs.device)
        rows, logit, constant = table[chosen], outputs.gather(1, chosen[:, None])[:, 0], offsets[chosen]
        against = self.method.against
        if against == "mean":
            return rows - table.mean(0), logit - outputs.mean(-1), constant - offsets.mean()
        if against is None:
            return rows, logit, constant
        if not isinstance(against, int) or not 0 <= against < table.shape[0]:
            raise ValueError(f"against={against!r}: give an id below {table.shape[0]}, 'mean' or nothing")
        return rows - table[against], logit - outputs[:, against], constant - offsets[against]

    def _final(self) -> Frozen | None:
        """The norm between the last layer and the unembedding."""
        last, given = self.seen.left[-1], self.seen.head[-1][0]
        if _same(last, given):
            return None
        for module, entered, left in reversed(self.seen.outside):
            if is_norm(module) and _same(left, given) and _same(entered, last):
                return freeze(module, entered, left)
        raise ValueError(f"{self.name}: between the last layer and the unembedding there is more than one norm")

    def _write(self, layer: int) -> tuple[Tensor, Frozen | None]:
        """What the layer's attention adds [b, e], and the norm on it, if any; the rest must be some module's output."""
        seen, own = self.seen, self.writes.get(layer)
        call = opened(self.calls[layer], "logit flow")
        call.check_values()
        if own is None:
            raise ValueError(f"{call.site.name}: no linear map reads the heads' outputs as they are")
        raw = seen.row(own.output)
        assert raw is not None
        inside = seen.inside[layer]
        options: list[tuple[Tensor, nn.Module | None]] = [(raw, None)]
        options += [(gave, module) for module, given, gave in inside if is_norm(module) and torch.equal(given, raw)]
        for write, module in options:
            rest = seen.left[layer] - seen.entered[layer] - write
            # A layer without an MLP adds nothing else.
            others = [gave for _, _, gave in inside if gave.shape == rest.shape] + [torch.zeros_like(rest)]
            if any(_same(gave, rest, seen.left[layer]) for gave in others):
                return write, None if module is None else freeze(module, raw, write)
        raise ValueError(f"{self.name}: layer {layer} does not add its attention to the residual stream as it is")

    def _heads(self, call: AttentionCall, own: Write, towards: Tensor) -> Tensor:
        """[b, h, n] of one layer."""
        aim = torch.einsum("heo,bo->bhe", own.weight, towards)
        value = call.of_heads(call.value, torch.arange(call.heads, device=call.value.device))
        gain = torch.einsum("bhme,bhe->bhm", value, aim)
        share, weights = self.start[:, None, None], torch.zeros_like(gain)
        for rows in blocks(call, self.start):
            weights = weights + (share[..., rows].to(gain.dtype) @ call.weights(None, rows).to(gain.dtype))[:, :, 0]
        return weights * gain


def _same(given: Tensor, wanted: Tensor, scale: Tensor | None = None) -> bool:
    """Equal up to rounding, of sums of numbers as large as scale's."""
    if given.shape != wanted.shape:
        return False
    size = float((wanted if scale is None else scale).abs().max())
    rounding = 1e-4 if given.dtype == torch.float32 else 1e-9 if given.dtype == torch.float64 else 2e-2
    return float((given - wanted).abs().max()) <= rounding * max(size, 1e-30)
