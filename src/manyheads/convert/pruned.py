"""Fewer heads: those that matter least are gone from the weights.

`uniform`: the same number in every layer. Where the heads that stay divide among the key/value heads, each of these
keeps as many of its query heads, its best; else whole groups go, a key/value head with all its query heads, and the
cache shrinks too. Otherwise all layers compete, group against group (head against head where a layer has only one
key/value head), and at least one stays in each: then too the cache shrinks. Cutting is exact: the model with the same
columns of o_proj set to zero computes the same.

No stock class takes another number of heads in each layer: such a model is a ManyheadsForCausalLM. LlamaConfig refuses
a hidden size that the heads do not divide; such a model is saved as MistralForCausalLM without a window, which has the
same weights and computes the same.

Sources: Michel et al., arXiv:1905.10650, where all layers compete; the uniform shape is that of checkpoints that stock
classes load.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.importance import Rows, head_scores
from manyheads.convert.layout import Attention, attentions, check_heads_apart

# Families whose settings are neither saved nor opened where the heads do not divide the hidden size.
_DIVIDED = ("gemma2", "gemma3_text")


def _alike(model: Any) -> tuple[Attention, int]:
    """The first layer and how many there are."""
    check_heads_apart(model)
    layers = attentions(model)
    first = layers[0]
    if any(layer.heads != first.heads or layer.kv_heads != first.kv_heads for layer in layers):
        raise ValueError(f"{type(model).__name__} has layers of different numbers of heads, which are not pruned here")
    return first, len(layers)


def in_all(model: Any, heads: int) -> tuple[int, int]:
    """How many heads go together where all layers compete, and how many such groups stay; ValueError where none fit."""
    first, count = _alike(model)
    size = first.heads // first.kv_heads if first.kv_heads > 1 else 1
    if heads % size or not count * size <= heads <= count * first.heads:
        raise ValueError(
            f"--heads {heads}: {type(model).__name__} has {count} layers of {first.heads} heads on {first.kv_heads} "
            f"key/value heads; over all layers it can keep {count * size} to {count * first.heads}"
            + (f", a multiple of {size}" if size > 1 else "")
        )
    return size, heads // size


def per_layer(model: Any, heads: int) -> tuple[int, int]:
    """Query and key/value heads that a layer keeps of `heads` in the whole model; ValueError where none fit."""
    first, count = _alike(model)
    size, name = first.heads // first.kv_heads, type(model).__name__
    own = heads // count
    if heads % count == 0 and 1 <= own <= first.heads:
        if own % first.kv_heads == 0:
            return own, first.kv_heads
        if own % size == 0:
            return own, own // size
    fit = sorted({k * first.kv_heads for k in range(1, size + 1)} | {k * size for k in range(1, first.kv_heads + 1)})
    raise ValueError(
        f"--heads {heads}: {name} has {count} layers of {first.heads} heads on {first.kv_heads} key/value heads; alike "
        f"in every layer it can keep {', '.join(str(count * k) for k in fit)}"
    )


def kept_heads(model: Any, heads: int, scores: Tensor, *, uniform: bool = True) -> list[list[int]]:
    """Per layer the query heads that stay, in their order. scores: [layers, heads]."""
    if not uniform:
        return _over_all_layers(model, heads, scores)
    own, groups = per_layer(model, heads)
    layer = attentions(model)[0]
    size = layer.heads // layer.kv_heads
    kept = []
    for row in scores:
        by_group = row.view(layer.kv_heads, size)
        if groups == layer.kv_heads:
            best = by_group.topk(own // groups, 1).indices + size * torch.arange(groups)[:, None]
        else:
            chosen = by_group.sum(1).topk(groups).indices
            best = (size * chosen[:, None]) + torch.arange(size)
        kept.append(sorted(best.flatten().tolist()))
    return kept


def _over_all_layers(model: Any, heads: int, scores: Tensor) -> list[list[int]]:
    size, many = in_all(model, heads)
    units = scores.unflatten(1, (-1, size)).sum(-1)
    # The best of each layer first, as a layer without heads has no shape in any class.
    best = torch.nn.functional.one_hot(units.argmax(1), units.shape[1]).bool()
    chosen = units.masked_fill(best, torch.inf).flatten().topk(many).indices.tolist()
    kept: list[list[int]] = [[] for _ in scores]
    for unit in sorted(chosen):
        layer, place = divmod(unit, units.shape[1])
        kept[layer] += range(size * place, size * (place + 1))
    return kept


@torch.no_grad()
def cut(model: Any, kept: Sequence[Sequence[int]]) -> Any:
    """A model without the other heads; the given one is left as it is. Where layers keep different numbers, it is a
    ManyheadsForCausalLM."""
    layers = attentions(model)
    size = layers[0].heads // layers[0].kv_heads
    groups = [sorted({head // size for head in row}) for row in kept]
    parts = [_slices(layer, row, held) for layer, row, held in zip(layers, kept, groups, strict=True)]
    shapes = [(len(row), len(held)) for row, held in zip(kept, groups, strict=True)]
    if len(set(shapes)) > 1:
        return _uneven(model, shapes, parts)
    config, cls = shaped(model, *shapes[0])
    made = cls._from_config(config, dtype=model.dtype)
    own: dict[str, Tensor] = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k or "norm" in k}
    for place, (layer, part) in enumerate(zip(layers, parts, strict=True)):
        own |= {f"model.layers.{place}.self_attn.{key}": value for key, value in layer.named(part).items()}
    made.load_state_dict(own)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval()


def _slices(layer: Attention, row: Sequence[int], held: Sequence[int]) -> dict[str, Tensor]:
    """A layer's projections with these query and key/value heads."""
    found = {}
    for name, linear in layer.projections().items():
        heads = held if name in ("k_proj", "v_proj") else row
        for part, value in (("weight", linear.weight), ("bias", linear.bias)):
            if value is not None:
                found[f"{name}.{part}"] = kept_rows(f"{name}.{part}", value, layer, heads)
    return found


def _uneven(model: Any, shapes: Sequence[tuple[int, int]], parts: Sequence[Mapping[str, Tensor]]) -> Any:
    from manyheads.convert.hosted import hosted
    from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM

    whole = hosted(model)
    specs = [
        {**spec, "heads": heads, "shell": {**spec["shell"], "kv_heads": kv_heads}}
        for spec, (heads, kv_heads) in zip(whole.config.layers, shapes, strict=True)
    ]
    made = ManyheadsForCausalLM(ManyheadsConfig(**{**whole.config.to_dict(), "layers": specs})).to(model.dtype)
    own = whole.state_dict()
    for place, part in enumerate(parts):
        own |= {f"model.stack.layers.{place}.self_attn.mechanism.{key}": value for key, value in part.items()}
    made.load_state_dict(own)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval()


def kept_rows(part: str, held: Tensor, layer: Attention, heads: Sequence[int]) -> Tensor:
    """What stays of `q_proj.weight` and the like with these heads: rows, and columns of what reads them."""
    if part == "o_proj.bias":
        return held
    places = _places(heads, layer.head_dim, held.device)
    return held[:, places] if part == "o_proj.weight" else held[places]


@torch.no_grad()
def zeroed(model: Any, kept: Sequence[Sequence[int]]) -> Any:
    """A copy of the same shape in which the other heads add nothing."""
    made = copy.deepcopy(model)
    for layer, row in zip(attentions(made), kept, strict=True):
        gone = [head for head in range(layer.heads) if head not in row]
        layer.module.o_proj.weight[:, _places(gone, layer.head_dim, layer.module.o_proj.weight.device)] = 0.0
    return made


def check_saved(model: Any, heads: int) -> None:
    """ValueError where the class cannot be written with so many heads in a layer."""
    width = model.config.hidden_size
    if model.config.model_type in _DIVIDED and width % heads:
        raise ValueError(f"{type(model).__name__} takes only numbers of heads that divide its hidden size {width}")


def check_pruned(model: Any, heads: int, *, uniform: bool = True) -> None:
    """ValueError where so many heads cannot stay."""
    if uniform:
        check_saved(model, per_layer(model, heads)[0])
        return
    from manyheads.convert.hosted import check_hosted

    in_all(model, heads)
    check_hosted(model)


def pruned(model: Any, heads: int, *, by: str = "importance", uniform: bool = True, calibration: Rows = ()) -> Any:
    """A model with `heads` query heads in all, those that matter most (`head_scores`); the given one is left as it is.

    uniform: the same number in every layer; else all layers compete. calibration: rows of token ids.
    """
    check_pruned(model, heads, uniform=uniform)
    return cut(model, kept_heads(model, heads, head_scores(model, calibration, by), uniform=uniform))


def _places(heads: Sequence[int], dim: int, device: Any) -> Tensor:
    """The rows of these heads."""
    return (torch.tensor(list(heads), device=device)[:, None] * dim + torch.arange(dim, device=device)).flatten().long()


def shaped(model: Any, heads: int, kv_heads: int) -> tuple[Any, Any]:
    """The configuration with so many heads, and the same class or one that takes them."""
    config = copy.deepcopy(model.config)
    cls, width, name = type(model), config.hidden_size, type(model).__name__
    settings = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": attentions(model)[0].head_dim,
    }
    if config.model_type == "llama" and width % heads:
        if config.attention_bias or config.mlp_bias:
            raise ValueError(
                f"{name} with biases and {heads} heads a layer has no class that takes it: keep a number of heads that "
                f"divides the hidden size {width}"
            )
        config, cls = _as_mistral(config, settings)
    elif config.model_type == "gemma2" and width % heads:
        raise ValueError(f"{name} takes only numbers of heads that divide its hidden size {width}")
    else:
        for key, value in settings.items():
            setattr(config, key, value)
    return config, cls


def _as_mistral(config: Any, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    from transformers import MistralConfig, MistralForCausalLM

    known = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", *settings)}
    for key in ("attention_bias", "mlp_bias", "pretraining_tp", "transformers_version"):
        known.pop(key, None)
    return MistralConfig(**{**known, **settings, "sliding_window": None}), MistralForCausalLM


@torch.no_grad()
def as_mistral(model: Any) -> Any:
    """A Llama as MistralForCausalLM without a window: the same weights and logits, for engines that read from a Llama's
    configuration that its heads have hidden_size / heads features, whatever it says. The given one is left as it is."""
    config, name = model.config, type(model).__name__
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(f"{name} has no twin among Mistrals; want a Llama without biases")
    own, cls = _as_mistral(config, {"head_dim": attentions(model)[0].head_dim})
    made = cls._from_config(own, dtype=model.dtype)
    made.load_state_dict(model.state_dict())
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval()
