"""Where a decoder keeps its attention's weights: layers with projections of their own for queries, keys and values."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Families whose layers are q_proj, k_proj, v_proj, o_proj with contiguous groups of query heads, each tested.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")


@dataclass(frozen=True)
class Attention:
    """One layer's attention. Query head h reads key/value head h // (heads / kv_heads).

    normed: queries and keys are normed after their projection. turned: features of a head that positions turn, as
    pairs (i, i + turned / 2); None where positions turn none.
    """

    module: Any
    heads: int
    kv_heads: int
    head_dim: int
    normed: bool
    turned: int | None

    def projections(self) -> dict[str, nn.Linear]:
        return {name: getattr(self.module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


def attentions(model: Any) -> list[Attention]:
    """The attention of every layer of a causal language model. ValueError for a layout that is not known here."""
    config = model.config
    name = type(model).__name__
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{name} (model_type {config.model_type!r}) has no converter for its layout; want one of {list(FAMILIES)}"
        )
    found = []
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    rotates = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    for layer, turns in zip(model.get_decoder().layers, rotates, strict=True):
        module = layer.self_attn
        plain = [type(getattr(module, f"{part}_proj", None)) is nn.Linear for part in "qkvo"]
        if not all(plain):
            raise ValueError(
                f"{name}: its projections are not plain Linear layers (quantised, or with adapters): merge adapters "
                "(merge_and_unload) and load it in float32 or bfloat16 first"
            )
        dim = int(module.head_dim)
        turned = int(dim * (1.0 if share is None else share)) if turns else None
        found.append(
            Attention(
                module,
                module.q_proj.out_features // dim,
                module.k_proj.out_features // dim,
                dim,
                hasattr(module, "k_norm"),
                turned,
            )
        )
    return found


def with_kv_heads(model: Any, kv_heads: int) -> Any:
    """A model of the same class and weights but for k_proj and v_proj, which are new and of `kv_heads` heads."""
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = kv_heads
    parameter = next(model.parameters())
    made = type(model)._from_config(config, dtype=parameter.dtype)
    own: dict[str, Tensor] = made.state_dict()
    given = {key: value for key, value in model.state_dict().items() if own[key].shape == value.shape}
    made.load_state_dict(given, strict=False)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(parameter.device).eval()


def cache_numbers(model: Any) -> int:
    """Numbers that the cache holds for one token, over all layers."""
    config = model.config
    if config.model_type == "deepseek_v3":
        return int(config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim))
    return sum(2 * layer.kv_heads * layer.head_dim for layer in attentions(model))
