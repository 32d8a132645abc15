"""Hugging Face's causal language models over several processes: their attention, by transformers' own interface."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from manyheads.inner import Across
from manyheads.parallel.layout import Kind

NAME = "manyheads_spread"
# Families whose every meeting of tokens is in the attention interface, with neither soft caps nor sinks.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "olmo2", "smollm3", "gpt2", "gpt_neox",
)  # fmt: skip
_CHANGES = ("softcap", "s_aux", "position_bias", "cache")

_across: weakref.WeakKeyDictionary[nn.Module, Across] = weakref.WeakKeyDictionary()


def check(model: Any) -> Kind:
    """The layout for this model's layers; ValueError where it cannot be spread."""
    from manyheads.hosts.families import layer_plans

    name = type(model).__name__
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"sequence_parallel: {name} ({kind}) is not among the models whose tokens meet in attention alone, as "
            f"far as is known here; want a ManyheadsForCausalLM or a causal language model of {', '.join(FAMILIES)}"
        )
    try:
        plans = layer_plans(model)
    except ValueError as error:
        raise ValueError(f"sequence_parallel: {name} cannot be spread as it is ({error})") from error
    return "contiguous" if all(plan.window is not None for plan in plans) else "zigzag"


@contextmanager
def spread(model: nn.Module, across: Across) -> Iterator[None]:
    """While open, the model attends over the tokens of all processes."""
    from manyheads.hosts.switching import switched

    _register()
    for module in model.modules():
        _across[module] = across
    try:
        with switched(model, NAME):
            yield
    finally:
        for module in model.modules():
            _across.pop(module, None)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    from manyheads.hosts.attention import describe_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, describe_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    name = type(module).__name__
    across = _across.get(module)
    if across is None:
        raise ValueError(f"{name} runs outside of the sequence_parallel that its model was in")
    for what in _CHANGES:
        if kwargs.get(what) is not None:
            raise ValueError(f"sequence_parallel: {name} uses {what}, which no scheme over several processes has")
    if dropout:
        raise ValueError(
            f"sequence_parallel: {name} has attention dropout {dropout}; set attention_dropout=0 or call eval()"
        )
    if not getattr(attention_mask, "plain", False):
        raise ValueError(f"sequence_parallel: {name} was given a mask of its own; want causal layers and key padding")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = attention_mask.window
    windows = None if window is None else [window] * query.shape[1]
    return across.attend(query, key, value, scale=scale, windows=windows).transpose(1, 2).contiguous(), None
