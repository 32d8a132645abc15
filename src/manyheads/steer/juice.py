"""JUICE: the model runs twice; what chosen heads said in the first run is added in the second."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.cache_names import with_cache
from manyheads.hosts.calls import opened
from manyheads.hosts.sites import choose, only_stack, text_stack
from manyheads.hosts.taps import AttentionCall, tap
from manyheads.hosts.wrappers import inside
from manyheads.steer.common import heads_by_layer, some_heads
from manyheads.steer.companions import alone, companions, named, own_cache
from manyheads.steer.method import Prompt, steering


@contextmanager
def juice(model: Any, scales: Mapping[tuple[int, int], float], *, stack: str | None = None) -> Iterator[None]:
    """Claim: heads that speak for the context and heads that speak for memory disturb each other within one run; adding
    what they said in an undisturbed run steers the answer either way.

    First run: o_h kept for every (layer, head) in scales. Second run: o_h' = o_h + scale_h o_h(first). Positive scales
    strengthen a head, negative ones weaken it; all zero changes nothing (and runs once). Every call of the model runs
    twice; while decoding the first run has its own cache, which the second one's changes never reach. stack:
    whose heads, where the model has several.
    Source: arXiv 2503.10996 (Just Run Twice), where a few heads are found on some examples, as by `head_effects`.
    """
    if not scales:
        raise ValueError("juice: scales is empty; give {(layer, head): scale}, positive to strengthen a head")
    active = {place: float(scale) for place, scale in scales.items() if scale}
    if not active:
        yield
        return
    where = only_stack(model, stack)
    chosen = {layer: heads or [] for layer, heads in heads_by_layer(model, list(active), where).items()}
    kept: dict[int, Tensor] = {}
    first = False

    def reader(call: AttentionCall) -> Tensor | None:
        own = opened(call, "juice").check_heads(chosen[call.layer])
        if first:
            kept[call.layer] = call.output[:, own].detach()
            return None
        said = call.memo.setdefault("first run", kept[call.layer])
        factors = call.output.new_tensor([active[call.layer, head] for head in own])[None, :, None, None]
        return call.replaced(call.output[:, own] + factors * said, own)

    whole = inside(model)
    names = list(inspect.signature(whole.forward).parameters)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal first
        if first:
            return args, kwargs
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        past = own_cache(whole, kwargs)
        own = {key: value for key, value in kwargs.items() if key != "labels"}
        if past is not None:
            own = with_cache(own, companions(past, name, lambda: [alone(past)])[0])
        first = True
        try:
            with torch.no_grad():
                module(**own)
        finally:
            first = False
        return (), kwargs

    with named(whole, "juice") as name, tap(model, reader, layers=sorted(chosen), stack=where, kind="self"):
        hook = whole.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@torch.no_grad()
def head_effects(model: Any, input_ids: Tensor, wanted: Tensor, unwanted: Tensor, scale: float = 1.0) -> Tensor:
    """[layers, heads]: how much strengthening each head by juice moves the last token's log p(wanted) - log
    p(unwanted), ids [b] each, on average; high: the head speaks for wanted. One run per head."""

    def margin() -> Tensor:
        logits = model(input_ids, use_cache=False).logits[:, -1].log_softmax(-1)
        return (logits.gather(1, wanted[:, None]) - logits.gather(1, unwanted[:, None])).mean()

    stack = text_stack(model)
    layers = [site.layer for site in choose(model, None, stack, "self")]
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    base = margin()
    found = torch.zeros(len(layers), heads)
    for layer in layers:
        for head in range(heads):
            with juice(model, {(layer, head): scale}, stack=stack):
                found[layer, head] = margin() - base
    return found


@steering(
    "juice",
    title="what chosen heads said in a first run added in a second",
    source="arXiv 2503.10996",
    kinds=("language", "vision-language"),
    neutral={"scale": 0.0},
    strength="scale",
    reach=(-1.0, 2.0),
)
def _open(model: Any, prompt: Prompt, *, heads: str, scale: float = 1.0) -> AbstractContextManager[None]:
    return juice(model, dict.fromkeys(some_heads(heads, "juice"), scale), stack=text_stack(model))
