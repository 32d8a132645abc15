"""Taps: read and change what attention layers do, while the model keeps its fast kernels.

with tap(model, reader, layers=[3]):    # reader(call) at every attention call of layer 3
    model(**inputs)

with record(model) as calls:            # or keep the calls
    model(**inputs)
calls[0].weights(heads=[1], rows=slice(0, 64))   # [b, 1, 64, m], made when asked for
calls["layers.0"]                                # the same call, by a part of its site's path

A tap holds queries, keys, values and head outputs, never a matrix [n, m]: weights are computed on demand, for the heads
and rows that are asked for, by the scores' own formula (scale, mask, soft cap, sinks, position bias). Works on every
transformers model that uses the library's attention interface (decoders, encoders, both, vision), on models of
diffusers with their default attention processors, and on manyheads mechanisms: those whose heads are values summed by
weights tell what they do inside, the others give their `need_weights`.

Legend: b batch, h query heads, g KV heads, n queries, m keys, d key dim, e value dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from manyheads.hosts.as_fed import as_fed, caches_noted
from manyheads.hosts.attend import Scoring, masked_attention, pack
from manyheads.hosts.calls import BLOCK_WEIGHTS, AttentionCall, Edit, MechanismCall, edits_heard
from manyheads.hosts.own_attention import heard
from manyheads.hosts.processors import processed
from manyheads.hosts.reading import Reader, check_run, fitting, reading, readings, run_again_alike
from manyheads.hosts.sites import Site, attends_alone, by_processor, choose, dispatches, remasks, sites
from manyheads.hosts.switching import switched, uncompiled
from manyheads.mechanism import Mechanism

__all__ = [
    "BLOCK_WEIGHTS",
    "NAME",
    "AttentionCall",
    "Calls",
    "Edit",
    "MechanismCall",
    "Reader",
    "Site",
    "record",
    "sites",
    "tap",
]

NAME = "manyheads_tapped"
# The same, with masks that are made whole and added to the scores.
ADDED = "manyheads_tapped_added"
# Arguments of an attention call that change its result, and whose weights are not known here.
_FOREIGN = ("sinks", "block_indices", "cache")


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

    layers, stack, kind choose among `sites(model)`; all of them by default. A layer number that several stacks have
    needs a stack: ValueError. Taps may be nested: the one opened first reads first, and what a reader returns is the
    output that the next one sees. With gradient checkpointing (the model's own) backward computes layers anew, with
    the readers of their forward pass, which are then called again, even if the tap is closed by then. Whatever
    torch.compile made, of this model and of others, runs as it was written while a tap is open.
    `output_attentions=True` gives the weights of each layer, after readers' edits, as eager attention does.
    """
    chosen = choose(model, layers, stack, kind)
    with ExitStack() as stack_of:
        stack_of.enter_context(uncompiled())
        stack_of.enter_context(run_again_alike(model))
        own = [site for site in chosen if attends_alone(site.module)]
        stack_of.enter_context(heard(model, own))
        stack_of.enter_context(processed([site for site in chosen if by_processor(site.module)]))
        if any(_dispatched(site) for site in chosen):
            _register()
            stack_of.enter_context(switched(model, NAME, _name))
            # Those that nobody reads attend through the same function.
            stack_of.enter_context(caches_noted([site for site in sites(model) if _dispatched(site)]))
        for site in chosen:
            stack_of.enter_context(reading(site, reader))
        yield chosen


@contextmanager
def record(
    model: nn.Module,
    *,
    gradients: bool = False,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
    kind: str | None = None,
) -> Iterator[Calls]:
    """Keeps the calls of the chosen sites, in the order in which they came. gradients: their outputs keep the gradient
    of a later backward pass, so that `weight_gradients` can be asked for."""
    calls = Calls()
    # A reader may live as long as a graph that hangs on its calls, and must not hold them.
    held = weakref.ref(calls)

    def keep(call: Any) -> Tensor | None:
        again = "first" in call.memo
        if not again:
            call.memo["first"] = weakref.ref(call), torch.is_grad_enabled()
            found = held()
            if found is not None:
                found.append(call)
        if not gradients:
            return None
        output: Tensor = call.output if call.output.requires_grad else call.output.detach().requires_grad_()
        first, had_graph = call.memo["first"]
        own = first()
        # Of a reentrant checkpoint only the run in backward has a graph.
        if own is not None and not (again and had_graph):
            output.retain_grad()
            own.output, own.keeps_gradient = output, True
        return output

    with tap(model, keep, layers=layers, stack=stack, kind=kind):
        yield calls


def _dispatched(site: Site) -> bool:
    """Whether the site attends through a function of transformers' registry."""
    return not (isinstance(site.module, Mechanism) or by_processor(site.module) or attends_alone(site.module))


class Calls(list[Any]):
    """Calls in the order in which they came: calls[0], calls[-2:]; and by name, calls["layers.1"], where that is part
    of the path of one site that was called once. ValueError for a name that means no call, or several."""

    def __getitem__(self, which: Any) -> Any:
        if not isinstance(which, str):
            return super().__getitem__(which)
        found = [number for number, call in enumerate(self) if _named(call.site.path, which)]
        if len(found) == 1:
            return super().__getitem__(found[0])
        paths = list(dict.fromkeys(call.site.path for call in self))
        if found:
            raise ValueError(
                f"{which!r} names calls {found}: ask for one by its number, or by more of its path: {paths}"
            )
        raise ValueError(f"{which!r} is part of no call's path; there are {paths or 'no calls yet'}")


def _named(path: str, name: str) -> bool:
    """Whether the name is a run of whole parts of the path."""
    return f".{name}." in f".{path}."


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    AttentionInterface.register(ADDED, _attention)
    AttentionMaskInterface.register(ADDED, eager_mask)


def _name(part: Any) -> str:
    """Under which name a part of a model attends. What the library itself never runs by SDPA may say wrongly that it
    is not causal, hold attention of its own that adds its mask, or put something of its own into it: it gets the masks
    that it knows."""
    if getattr(part, "_supports_sdpa", True):
        return NAME
    own = [module for module in part.modules() if dispatches(module)]
    causal = own and all(getattr(module, "is_causal", False) for module in own)
    return NAME if causal and not any(remasks(module) for module in own) else ADDED


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
) -> tuple[Tensor, Tensor | None]:
    check_run(module)
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise ValueError(f"{type(module).__name__} attends by {foreign[0]} of its own, which a tap cannot read")
    scoring = Scoring(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling), kwargs.get("softcap"), kwargs.get("s_aux")
    )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    mask, width = attention_mask, key.shape[2]
    if mask is None:  # all of a static cache that was fed, and nothing of its empty end
        whole = as_fed(module, key, value, None)
        key, value = whole[:2] if whole[0].shape[2] < width else (key, value)
    if causal and query.shape[2] < key.shape[2]:
        # The library's kernel would count queries from the first key; fewer queries are the last.
        n, m = query.shape[2], key.shape[2]
        mask, causal = torch.ones(1, 1, n, m, dtype=torch.bool, device=query.device).tril(m - n), False
    if kwargs.get("indices") is not None:
        mask = _among(mask, kwargs["indices"], key.shape[2])
    if position_bias is not None:
        mask, causal = _biased(mask, position_bias, causal, query), False

    def call(site: Site) -> AttentionCall:
        return AttentionCall(site, query, *as_fed(module, key, value, mask), causal, scoring)

    # The model's own output comes of what its cache gave, to the bit.
    make = partial(_output, module, query, key, value, mask, dropout, causal, scoring)
    if not (kwargs.get("output_attentions") or _gathered()):
        return _read(module, call, make, dropout).transpose(1, 2).contiguous(), None
    weights = call(Site(0, "", "", "", module)).weights().to(query.dtype).clone()

    def note(_: AttentionCall, heads: list[int], rows: slice, edited: Tensor) -> None:
        weights[:, heads, rows] = edited.to(weights.dtype)

    with edits_heard(note):
        output = _read(module, call, make, dropout)
    # As wide as what the cache gave: the latest keys of a window, all of a static buffer.
    gone = weights.shape[-1] - width
    return output.transpose(1, 2).contiguous(), weights[..., gone:] if gone >= 0 else pad(weights, (0, -gone))


def _gathered() -> bool:
    """Whether the library gathers weights in this call: not every model hands `output_attentions` on to its layers."""
    from transformers.utils.output_capturing import _active_collector

    return any(name.endswith("attentions") for name in _active_collector.get() or ())


def _read(
    module: nn.Module, call_at: Callable[[Site], AttentionCall], make: Callable[[], Tensor], dropout: float
) -> Tensor:
    """The output [b, h, n, e] that the readers of this layer leave."""
    own = list(readings(module))
    # A graph, drawn dropout and what several readers see have their place in time; a sole reader may leave it away.
    if len(own) == 1 and not dropout and not torch.is_grad_enabled():
        return _read_once(own[0], call_at(own[0][0]), make)
    output = make()
    for site, reader, memo in own:
        call = call_at(site)
        call.output, call.memo, call.dropout = output, memo, dropout
        changed = reader(call)
        if changed is not None:
            output = fitting(changed, output.shape, site)
    return output


def _among(mask: Tensor | None, indices: Tensor, m: int) -> Tensor:
    """The mask [b, 1 or h, n, m] with the keys alone that a sparse layer chose for each query, indices [b, n, k]."""
    chosen = torch.zeros(*indices.shape[:2], m, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter_(-1, indices.long(), True)[:, None]
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _read_once(reading: tuple[Site, Reader, dict[str, Any]], call: AttentionCall, make: Callable[[], Tensor]) -> Tensor:
    """What the one reader makes of a call whose output is computed when it is asked for."""
    site, reader, call.memo = reading
    call.output = make
    changed = reader(call)
    if changed is None:
        return call.output
    shape = torch.Size((*call.query.shape[:3], call.value.shape[-1]))
    return fitting(changed, shape, site)


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
