"""Fewer heads: those that matter least are gone from the weights, the same number in every layer.

How much a head matters, from text (rows x of tokens, loss L the mean negative log-likelihood of the next token):

    importance   mean over rows of |dL / dg_h| at g = 1, where g_h multiplies head h's output before o_proj
    ablation     mean over rows of L with g_h = 0, less L
    random       by a seed, to compare with

Where the heads that stay divide among the key/value heads, each of these keeps as many of its query heads, its best;
else whole groups go, a key/value head with all its query heads, and the cache shrinks too. Cutting is exact: the model
with the same columns of o_proj set to zero computes the same.

LlamaConfig refuses a hidden size that the heads do not divide; such a model is saved as MistralForCausalLM without a
window, which has the same weights and computes the same.

Sources: Michel et al., arXiv:1905.10650 (gates and their gradients; ablation); the uniform shape is that of
checkpoints that stock classes load.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.convert.layout import Attention, attentions, check_heads_apart

MEASURES = ("importance", "ablation", "random")
Rows = Sequence[Sequence[int]]


def per_layer(model: Any, heads: int) -> tuple[int, int]:
    """Query and key/value heads that a layer keeps of `heads` in the whole model; ValueError where none fit."""
    check_heads_apart(model)
    layers = attentions(model)
    first, count = layers[0], len(layers)
    size, name = first.heads // first.kv_heads, type(model).__name__
    if any(layer.heads != first.heads or layer.kv_heads != first.kv_heads for layer in layers):
        raise ValueError(f"{name} has layers of different numbers of heads, which cannot be pruned alike")
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


def head_scores(model: Any, rows: Rows, by: str = "importance", *, seed: int = 0) -> Tensor:
    """[layers, heads]: how much each head matters; greater matters more."""
    layers = attentions(model)
    shape = (len(layers), layers[0].heads)
    if by not in MEASURES:
        raise ValueError(f"--by {by!r}: want one of {', '.join(MEASURES)}")
    if by == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    if not rows:
        raise ValueError("to know how much heads matter takes calibration text: rows of token ids")
    gates = torch.ones(shape, device=model.device, dtype=model.dtype)
    return (_by_gradient if by == "importance" else _by_ablation)(model, rows, gates).cpu()


def _by_gradient(model: Any, rows: Rows, gates: Tensor) -> Tensor:
    gates.requires_grad_()
    total = torch.zeros(gates.shape, dtype=torch.float64, device=gates.device)
    with _gated(model, gates), torch.enable_grad():
        for row in rows:
            (gradient,) = torch.autograd.grad(_loss(model, row), gates)
            total += gradient.double().abs()
    return total / len(rows)


@torch.no_grad()
def _by_ablation(model: Any, rows: Rows, gates: Tensor) -> Tensor:
    total = torch.zeros(gates.shape, dtype=torch.float64, device=gates.device)
    with _gated(model, gates):
        for row in rows:
            whole = float(_loss(model, row))
            for layer, head in torch.cartesian_prod(*(torch.arange(n) for n in gates.shape)).tolist():
                gates[layer, head] = 0.0
                total[layer, head] += float(_loss(model, row)) - whole
                gates[layer, head] = 1.0
    return total / len(rows)


def _loss(model: Any, row: Sequence[int]) -> Tensor:
    ids = torch.tensor([list(row)], device=model.device)
    logits = model(ids, use_cache=False).logits[0, :-1]
    return nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, ids[0, 1:])


@contextmanager
def _gated(model: Any, gates: Tensor) -> Any:
    """Every head's output is multiplied by its gate."""

    def gate(place: int, layer: Attention) -> Callable[[Any, Any], Any]:
        def hook(module: Any, args: Any) -> Any:
            mixed = args[0].unflatten(-1, (layer.heads, layer.head_dim))
            return ((mixed * gates[place][:, None]).flatten(-2),)

        return hook

    hooks = [
        layer.module.o_proj.register_forward_pre_hook(gate(place, layer))
        for place, layer in enumerate(attentions(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kept_heads(model: Any, heads: int, scores: Tensor) -> list[list[int]]:
    """Per layer the query heads that stay, in their order."""
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


@torch.no_grad()
def cut(model: Any, kept: Sequence[Sequence[int]]) -> Any:
    """A model without the other heads; the given one is left as it is."""
    layers = attentions(model)
    size = layers[0].heads // layers[0].kv_heads
    groups = [sorted({head // size for head in row}) for row in kept]
    config, cls = shaped(model, len(kept[0]), len(groups[0]))
    made = cls._from_config(config, dtype=model.dtype)
    own: dict[str, Tensor] = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k or "norm" in k}
    for place, (layer, row, held) in enumerate(zip(layers, kept, groups, strict=True)):
        parts = {}
        for name, linear in layer.projections().items():
            heads = held if name in ("k_proj", "v_proj") else row
            parts[f"{name}.weight"] = kept_rows(f"{name}.weight", linear.weight, layer, heads)
            if linear.bias is not None:
                parts[f"{name}.bias"] = kept_rows(f"{name}.bias", linear.bias, layer, heads)
        own |= {f"model.layers.{place}.self_attn.{key}": value for key, value in layer.named(parts).items()}
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


def pruned(model: Any, heads: int, *, by: str = "importance", calibration: Rows = ()) -> Any:
    """A model with `heads` query heads in all, the same number in every layer."""
    per_layer(model, heads)
    return cut(model, kept_heads(model, heads, head_scores(model, calibration, by)))


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
