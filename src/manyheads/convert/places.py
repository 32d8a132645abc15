"""Which part of our model holds which part of a host: families, the names of their weights, their attention as a spec.

Every tensor of the host has one place among ours, and back: as it is, or as rows of what the host fuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from manyheads.convert.layout import FUSED, Attention, attentions, check_bare
from manyheads.hosts.families import layer_plans


@dataclass(frozen=True)
class Family:
    """norms: where a layer's norms stand, as in ManyheadsConfig. offset: of their gains. scaled: embeddings are
    multiplied by the root of their size. activation: the setting that names it. capped: scores are capped."""

    norms: str = "before"
    offset: float = 0.0
    scaled: bool = False
    activation: str = "hidden_act"
    capped: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(),
    "smollm3": Family(),
    "olmo2": Family(norms="after"),
    "gemma": Family(offset=1.0, scaled=True),
    "gemma2": Family("around", 1.0, True, "hidden_activation", True),
    # It has the setting that caps scores, and its attention does not read it.
    "gemma3_text": Family("around", 1.0, True, "hidden_activation"),
}
_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}
_NORMS = {
    "before": {"self_attn.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"},
    "after": {"self_attn.norm_after": "post_attention_layernorm", "mlp.norm_after": "post_feedforward_layernorm"},
    "around": {
        "self_attn.norm": "input_layernorm",
        "self_attn.norm_after": "post_attention_layernorm",
        "mlp.norm": "pre_feedforward_layernorm",
        "mlp.norm_after": "post_feedforward_layernorm",
    },
}
_KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "initializer_range", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip


def check_family(model: Any) -> None:
    """ValueError, by name, for what a host has and our model has no place for."""
    check_bare(model)
    config, name = model.config, type(model).__name__
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"{name} cannot be hosted yet; want one of {list(FAMILIES)}")
    if not name.endswith("ForCausalLM"):
        raise ValueError(f"{name} is no causal language model: load it with AutoModelForCausalLM")
    activation = getattr(config, family.activation)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{name} has the activation {activation!r}, for which our model has no place")
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError(f"{name} has use_bidirectional_attention, for which a causal model has no place")
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if kinds:
        raise ValueError(f"{name} has layers of kind {kinds[0]}, for which our model has no place")
    for key in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(config, key, None):
            raise ValueError(f"{name} has {key}={getattr(config, key)}, for which our model has no place: set it to 0")
    rope = model.get_decoder().rotary_emb.rope_type
    for kind in rope.values() if isinstance(rope, dict) else (rope,):
        if kind in ("dynamic", "longrope"):
            raise ValueError(f"{name} has rotary scaling {kind!r}, whose angles change with the length")


def settings(model: Any) -> dict[str, Any]:
    """The host's configuration as ours, but for the layers' specs."""
    config, family = model.config, FAMILIES[model.config.model_type]
    return {
        **{key: getattr(config, key) for key in _KEPT},
        "hidden_act": _ACTIVATIONS[getattr(config, family.activation)],
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "norm_placement": family.norms,
        "norm_offset": family.offset,
        "embedding_scale": config.hidden_size**0.5 if family.scaled else 1.0,
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "is_causal": True,
        "host": {
            **json.loads(config.to_json_string(use_diff=False)),
            "model_type": config.model_type,
            "architectures": [type(model).__name__],
        },
    }


def own_specs(model: Any) -> list[dict[str, Any]]:
    """The host's attention, layer by layer, as softmax."""
    family, config = FAMILIES[model.config.model_type], model.config
    specs = []
    for i, (layer, plan) in enumerate(zip(attentions(model), layer_plans(model), strict=True)):
        shell: dict[str, Any] = {"head_dim": layer.head_dim, "kv_heads": layer.kv_heads}
        biases = {name[0]: True for name, held in layer.projections().items() if held.bias is not None}
        if biases:
            shell["bias"] = biases
        if layer.normed:
            shell |= {"qk_norm": "whole" if layer.mixed_norms else "head", "norm_eps": config.rms_norm_eps}
            shell |= {"norm_offset": family.offset} if family.offset else {}
        if layer.module.scaling != layer.head_dim**-0.5:
            shell["scale"] = layer.module.scaling
        if family.capped and config.attn_logit_softcapping is not None:
            shell["softcap"] = config.attn_logit_softcapping
        if plan.window is not None:
            shell["window"] = plan.window
        specs.append({"name": "softmax", "shell": shell, "rotary": _rotary(model, i, layer)})
    return specs


def _rotary(model: Any, place: int, layer: Attention) -> dict[str, Any] | None:
    """By how much one position turns the pairs of a head, None where positions turn nothing."""
    config, rope = model.config, model.get_decoder().rotary_emb
    if not layer.turned:
        return None
    parameters, kind = config.rope_parameters, ""
    if isinstance(rope.rope_type, dict):
        kind = f"{config.layer_types[place]}_"
        parameters = parameters[config.layer_types[place]]
    angles = getattr(rope, f"{kind}inv_freq")
    turned = 2 * len(angles)
    if parameters["rope_type"] == "default" and turned == layer.head_dim:
        return {"base": float(parameters["rope_theta"])}
    rotary = {"angles": angles.tolist(), "amplitude": float(getattr(rope, f"{kind}attention_scaling"))}
    return rotary if turned == layer.head_dim else {**rotary, "fraction": turned / layer.head_dim}


class Place(NamedTuple):
    """A tensor of ours is the host's, or these rows of it."""

    ours: str
    theirs: str
    rows: slice = slice(None)


def places(model: Any) -> Iterator[Place]:
    """Where every tensor of a host stands among ours."""
    yield Place("model.embed_tokens.weight", "model.embed_tokens.weight")
    yield Place("model.stack.norm.weight", "model.norm.weight")
    yield Place("lm_head.weight", "lm_head.weight")
    norms = _NORMS[FAMILIES[model.config.model_type].norms]
    for i, layer in enumerate(attentions(model)):
        ours, theirs = f"model.stack.layers.{i}", f"model.layers.{i}"
        for own, name in norms.items():
            yield Place(f"{ours}.{own}.weight", f"{theirs}.{name}.weight")
        yield from _mlp(ours, theirs, model.get_decoder().layers[i].mlp)
        for key in layer.module.state_dict():
            name, _, kind = key.partition(".")
            parts = layer.rows() if name == FUSED else {name: slice(None)}
            for part, rows in parts.items():
                yield Place(f"{ours}.self_attn.mechanism.{part}.{kind}", f"{theirs}.self_attn.{key}", rows)


def _mlp(ours: str, theirs: str, mlp: Any) -> Iterator[Place]:
    for key in mlp.state_dict():
        name, _, kind = key.partition(".")
        if name == "gate_up_proj":
            half = mlp.gate_up_proj.out_features // 2
            yield Place(f"{ours}.mlp.gate_proj.{kind}", f"{theirs}.mlp.{key}", slice(0, half))
            yield Place(f"{ours}.mlp.up_proj.{kind}", f"{theirs}.mlp.{key}", slice(half, None))
        else:
            yield Place(f"{ours}.mlp.{key}", f"{theirs}.mlp.{key}")
