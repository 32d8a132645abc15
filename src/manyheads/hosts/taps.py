"""Taps: read and change what attention layers do, while the model keeps its fast kernels.

with tap(model, reader, layers=[3]):    # reader(call) at every attention call of layer 3
    model(**inputs)

with record(model) as calls:            # or keep the calls
    model(**inputs)
calls[0].weights(heads=[1], rows=slice(0, 64))   # [b, 1, 64, m], made when asked for

A tap holds queries, keys, values and head outputs, never a matrix [n, m]: weights are computed on demand, for the heads
and rows that are asked for, by the scores' own formula (scale, mask, soft cap, sinks, position bias). Works on every
transformers model that uses the library's attention interface (decoders, encoders, both, vision), and on manyheads
mechanisms, which give their `need_weights`.

Legend: b batch, h query heads, g KV heads, n queries, m keys, d key dim, e value dim.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.attend import Scoring, masked_attention, pack, probabilities
from manyheads.mechanism import Mechanism, Result

NAME = "manyheads_tapped"
# Weights in one block of rows: 2^20 float32 numbers are 4 MiB, and the steps of a softmax hold six of them.
BLOCK_WEIGHTS = 2**20
# A weight block and its rows -> the block that takes its place.
Edit = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Site:
    """A place where a model attends. layer counts from 0 within its stack and kind.

    stack: "decoder", "encoder", "text" or "vision". kind: "self" or "cross".
    """

    layer: int
    stack: str
    kind: str
    path: str
    module: nn.Module = field(repr=False)


class AttentionCall:
    """One call of an attention layer. query [b, h, n, d], key [b, g, m, d], value [b, g, m, e], output [b, h, n, e];
    query and key as they are scored, after rotation. mask [b or 1, 1 or h, n, m]: bool (True = may attend) or added to
    the scores; None: all, or with `causal` those before."""

    def __init__(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring
    ):
        self.site, self.query, self.key, self.value = site, query, key, value
        self.mask, self.causal, self.scoring = mask, causal, scoring
        self.output: Tensor
        # Whether the output keeps its gradient, which a tensor does not tell without a warning.
        self.keeps_gradient = False

    @property
    def layer(self) -> int:
        return self.site.layer

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def scale(self) -> float:
        return self.scoring.scale

    def allowed(self, rows: slice) -> Tensor | None:
        """What queries of these rows may see, [b or 1, 1 or h, rows, m]: bool or added; None where it is everything."""
        if self.mask is not None:
            return self.mask[:, :, rows]
        if not self.causal:
            return None
        n, m = self.query.shape[2], self.key.shape[2]
        start, stop, _ = rows.indices(n)
        device = self.query.device
        return (torch.arange(start, stop, device=device)[:, None] >= torch.arange(m, device=device))[None, None]

    def weights(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        """softmax of the scores, [b, heads, rows, m], float32 at least; all heads and rows unless told otherwise."""
        query, key, scoring, seen = self._select(heads, rows)
        return probabilities(query, key, scoring, seen).flatten(1, 2)

    def _select(self, heads: Sequence[int] | None, rows: slice) -> tuple[Tensor, Tensor, Scoring, Tensor | None]:
        seen, query = self.allowed(rows), self.query[:, :, rows]
        alike = seen is None or seen.shape[1] == 1
        if heads is None and alike:
            return pack(query, self.key.shape[1]), self.key, self.scoring, seen
        chosen = torch.tensor(self.check_heads(heads), device=query.device)
        sinks = None if self.scoring.sinks is None else self.scoring.sinks.index_select(0, chosen)
        if seen is not None and not alike:
            seen = seen.index_select(1, chosen)
        own = Scoring(self.scoring.scale, self.scoring.softcap, sinks)
        return query.index_select(1, chosen).unsqueeze(2), self.of_heads(self.key, chosen), own, seen

    def of_heads(self, rows: Tensor, heads: Sequence[int] | Tensor) -> Tensor:
        """Keys or values [b, g, m, d] that the given query heads read, [b, heads, m, d]."""
        heads = torch.as_tensor(heads, device=rows.device)
        if rows.shape[1] == self.heads and heads.numel() == self.heads:
            return rows
        return rows.index_select(1, heads // (self.heads // rows.shape[1]))

    def check_heads(self, heads: Sequence[int] | None) -> list[int]:
        wanted = list(range(self.heads)) if heads is None else [int(head) for head in heads]
        wrong = [head for head in wanted if not 0 <= head < self.heads]
        if wrong or not wanted:
            raise ValueError(f"{self.site.path} has heads 0 to {self.heads - 1}; got {wrong or 'none'}")
        return wanted

    def blocks(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Iterator[slice]:
        """Slices of the rows whose weights for these heads stay small."""
        start, stop, _ = rows.indices(self.query.shape[2])
        line = self.query.shape[0] * (self.heads if heads is None else len(heads)) * self.key.shape[2]
        step = max(1, BLOCK_WEIGHTS // max(1, line))
        for first in range(start, stop, step):
            yield slice(first, min(stop, first + step))

    def mix(self, edit: Edit, heads: Sequence[int] | None = None) -> Tensor:
        """The output [b, h, n, e] with edit(weights [b, heads, rows, m], rows) in the place of those heads' weights;
        other heads as they are. A reader may return it. Made in blocks of rows, where no gradient has to keep them."""
        chosen = torch.tensor(self.check_heads(heads), device=self.query.device)
        value = self.of_heads(self.value, chosen)
        parts = [edit(self.weights(heads, rows), rows).to(value.dtype) @ value for rows in self.blocks(heads)]
        return self.replaced(torch.cat(parts, 2), chosen)

    def replaced(self, output: Tensor, heads: Sequence[int] | Tensor) -> Tensor:
        """The call's output with these heads' [b, heads, n, e] in their place."""
        chosen = torch.as_tensor(heads, device=output.device)
        if chosen.numel() == self.heads and bool((chosen == torch.arange(self.heads, device=output.device)).all()):
            return output.to(self.output.dtype)
        return self.output.index_copy(1, chosen, output.to(self.output.dtype))

    def weight_gradients(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        """d loss / d weights, [b, heads, rows, m] after a backward pass under record(gradients=True): no matrix was
        kept for it, since it is d loss / d output times the values."""
        if not self.keeps_gradient or self.output.grad is None:
            raise ValueError(
                f"{self.site.path}: no gradient has reached this layer's output; use record(model, gradients=True) "
                "and call backward on a loss of the model's output"
            )
        chosen = torch.tensor(self.check_heads(heads), device=self.query.device)
        upstream = self.output.grad.index_select(1, chosen)[:, :, rows]
        return upstream @ self.of_heads(self.value, chosen).detach().transpose(2, 3)


class MechanismCall:
    """One call of a manyheads mechanism: its inputs and its result [b, n, dim], weights on demand by `need_weights`.

    What lies inside (queries, head outputs) differs from mechanism to mechanism and is not offered.
    """

    def __init__(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], result: Result):
        self.site, self.args, self.kwargs, self.result = site, args, kwargs, result
        self.output = result.output
        self.heads: int = site.module.heads  # type: ignore[assignment]

    @property
    def layer(self) -> int:
        return self.site.layer

    def weights(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        """[b, heads, rows, m]: the effective weights. A mechanism gives all of its matrix at once."""
        if self.result.weights is None:
            again: Result = self.site.module.forward(*self.args, **{**self.kwargs, "need_weights": True})
            self.result = self.result._replace(weights=again.weights)
        weights = self.result.weights
        if weights is None:
            raise ValueError(f"{self.site.path}: {type(self.site.module).__name__} has no weights for this call")
        weights = weights[:, :, rows]
        return weights if heads is None else weights[:, list(heads)]

    def blocks(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Iterator[slice]:
        yield rows


# Gets a call; may give back an output [b, h, n, e] ([b, n, dim] of a mechanism) that takes the place of the call's.
Reader = Callable[[Any], Tensor | None]


def sites(model: nn.Module) -> list[Site]:
    """Every place where the model attends, in the order of its modules; a ValueError if there is none."""
    found: list[Site] = []
    counts: dict[tuple[str, str], int] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Mechanism) and not _dispatches(module):
            continue
        kind = _kind(path, module)
        stack = _stack(path, module)
        layer = counts.get((stack, kind), 0)
        counts[stack, kind] = layer + 1
        found.append(Site(layer, stack, kind, path, module))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention that can be tapped: neither layers that use transformers' "
            "attention interface nor manyheads mechanisms"
        )
    return found


def _dispatches(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in transformers' registry."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _kind(path: str, module: nn.Module) -> str:
    last = path.lower()
    crossing = "encoder_attn" in last or "encdec" in last or "cross" in last or "cross" in type(module).__name__.lower()
    return "cross" if crossing or getattr(module, "is_cross_attention", False) else "self"


def _stack(path: str, module: nn.Module) -> str:
    parts = path.lower().split(".")
    for part in parts:
        for name in ("vision", "text"):
            if part.startswith(name):
                return name
    for part in parts:
        if part in ("decoder", "encoder"):
            return part
    causal = module.causal if isinstance(module, Mechanism) else getattr(module, "is_causal", True)
    return "decoder" if causal else "encoder"


@contextmanager
def tap(
    model: nn.Module,
    reader: Reader,
    *,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
    kind: str | None = None,
) -> Iterator[list[Site]]:
    """reader(call) at every attention call of the chosen sites, after their output was computed; gives the sites.

    layers, stack, kind choose among `sites(model)`; all of them by default. Taps may be nested: the one opened first
    reads first, and what a reader returns is the output that the next one sees.
    """
    everywhere = sites(model)
    chosen = [
        site
        for site in everywhere
        if (layers is None or site.layer in set(layers)) and stack in (None, site.stack) and kind in (None, site.kind)
    ]
    missing = set(layers or ()) - {site.layer for site in chosen}
    if missing or not chosen:
        have = sorted({(site.stack, site.kind) for site in everywhere})
        deepest = max(site.layer for site in everywhere)
        raise ValueError(
            f"{type(model).__name__} has no such layers (layers={sorted(missing) or layers}, stack={stack}, "
            f"kind={kind}); it has layers 0 to {deepest} of {have}"
        )
    with ExitStack() as stack_of:
        if any(not isinstance(site.module, Mechanism) for site in chosen):
            stack_of.enter_context(_switched(model))
        for site in chosen:
            stack_of.enter_context(_reading(site, reader))
        yield chosen


@contextmanager
def record(
    model: nn.Module,
    *,
    gradients: bool = False,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
    kind: str | None = None,
) -> Iterator[list[Any]]:
    """Keeps the calls of the chosen sites, in the order in which they came. gradients: their outputs keep the gradient
    of a later backward pass, so that `weight_gradients` can be asked for."""
    calls: list[Any] = []

    def keep(call: Any) -> Tensor | None:
        calls.append(call)
        if not gradients:
            return None
        if not call.output.requires_grad:
            call.output = call.output.detach().requires_grad_()
        call.output.retain_grad()
        call.keeps_gradient = True
        found: Tensor = call.output
        return found

    with tap(model, keep, layers=layers, stack=stack, kind=kind):
        yield calls


_readers: weakref.WeakKeyDictionary[nn.Module, list[tuple[Site, Reader]]] = weakref.WeakKeyDictionary()


@contextmanager
def _reading(site: Site, reader: Reader) -> Iterator[None]:
    module, entry = site.module, (site, reader)
    own = _readers.setdefault(module, [])
    own.append(entry)
    hooks = []
    if isinstance(module, Mechanism) and len(own) == 1:
        hooks = [
            module.register_forward_pre_hook(_weights_with_state, with_kwargs=True),
            module.register_forward_hook(_on_mechanism, with_kwargs=True),
        ]
    try:
        yield
    finally:
        own.remove(entry)
        for hook in hooks:
            hook.remove()


def _weights_with_state(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A pass that changes a state cannot be made a second time for its weights."""
    return args, kwargs | {"need_weights": True} if kwargs.get("state") is not None else kwargs


def _on_mechanism(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Result) -> Result:
    for site, reader in _readers.get(module, []):
        call = MechanismCall(site, args, kwargs, result)
        changed = reader(call)
        if changed is not None:
            result = result._replace(output=_fitting(changed, result.output, site))
    return result


def _fitting(changed: Tensor, output: Tensor, site: Site) -> Tensor:
    if changed.shape != output.shape:
        raise ValueError(f"{site.path}: a reader returned {tuple(changed.shape)}; the output is {tuple(output.shape)}")
    return changed


_switches: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@contextmanager
def _switched(model: Any) -> Iterator[None]:
    """While open, the model attends through `_attention`. Configs are copied first: several models may share one."""
    if _switches.get(model, 0):
        _switches[model] += 1
        try:
            yield
        finally:
            _switches[model] -= 1
        return
    _register()
    kept, memo = [], {}  # type: ignore[var-annotated]
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, "_attn_implementation", None) == "manyheads_ragged":
            raise ValueError(
                f"{type(model).__name__} attends through a shrunk cache: tap it outside the policy, after release()"
            )
        if config is not None and not isinstance(module, Mechanism):
            kept.append((module, config))
            module.config = copy.deepcopy(config, memo)
    _switches[model] = 1
    try:
        for module in model.modules():
            if hasattr(module, "set_attn_implementation") and module._can_set_attn_implementation():
                module.set_attn_implementation(NAME)
        yield
    finally:
        _switches.pop(model, None)
        for module, config in kept:
            module.config = config


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scoring = Scoring(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling), kwargs.get("softcap"), kwargs.get("s_aux")
    )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    mask = attention_mask
    if position_bias is not None:
        mask, causal = _biased(mask, position_bias, causal, query), False
    output = _output(module, query, key, value, mask, dropout, causal, scoring)
    for site, reader in _readers.get(module, []):
        call = AttentionCall(site, query, key, value, mask, causal, scoring)
        call.output = output
        changed = reader(call)
        if changed is not None:
            output = _fitting(changed, output, site)
    return output.transpose(1, 2).contiguous(), None


def _biased(mask: Tensor | None, bias: Tensor, causal: bool, query: Tensor) -> Tensor:
    """One mask that is added to the scores, of a position bias [1, h, n, m] and of what may be seen."""
    if causal:
        n, m = bias.shape[-2:]
        mask = torch.ones(n, m, dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(query.dtype).min)
    return bias + mask


def _output(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scoring: Scoring,
) -> Tensor:
    """[b, h, n, e], by the kernel that the model itself would use where that has no matrix."""
    if scoring.plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scoring.scale, is_causal=causal
        )[0].transpose(1, 2)
    if dropout:
        raise ValueError("attention dropout with soft caps or sinks: call model.eval() before tapping")
    whole = AttentionCall(Site(0, "", "", "", module), query, key, value, mask, causal, scoring)
    out = masked_attention(pack(query, key.shape[1]), key, value, scoring, whole.allowed)
    return out.flatten(1, 2)
