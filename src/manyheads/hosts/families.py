"""What is known of the families of models: their layers, windows and rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Families whose outputs are tested against the dense cache. Others are probed when first used.
TESTED = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "smollm3", "gpt2", "gpt_neox",
    "gpt_oss",
)  # fmt: skip


_WINDOWED = ("sliding_attention",)


_FULL = ("full_attention",)


@dataclass(frozen=True)
class LayerPlan:
    """What a model's attention layer asks of its cache."""

    window: int | None


def layer_plans(model: Any) -> list[LayerPlan]:
    """The layers of a causal language model, or a ValueError that says why it cannot be shrunk."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name} is not a transformers model; give one that AutoModelForCausalLM loads")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not model.can_generate() or _is_encoder(model):
        raise ValueError(f"{name} is not a causal language model: it has no cache to shrink")
    if is_own(model):
        from manyheads.hosts.own_cache import own_windows

        return [LayerPlan(window) for window in own_windows(model)]
    # None, as some configs have it, leaves it to the head of the model.
    if getattr(config, "is_causal", None) is False:
        raise ValueError(f"{name} has is_causal=False: tokens see the future, so nothing may be cached")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} does not use transformers' attention interface, so its cache cannot be ragged")
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise ValueError(f"{name} shares keys between layers, which a ragged cache does not support")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name} caches latents (MLA), which are already shared by all heads")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    strange = sorted(set(kinds) - set(_WINDOWED) - set(_FULL))
    if strange:
        raise ValueError(
            f"{name} has layers of kind {', '.join(strange)}; only full and sliding attention can be shrunk"
        )
    return [LayerPlan(window if kind in _WINDOWED else None) for kind in kinds]


def is_own(model: Any) -> bool:
    """Whether the model is one of manyheads' own."""
    return bool(model.config.get_text_config(decoder=True).model_type == "manyheads")


def _is_encoder(model: Any) -> bool:
    """Encoders that may become decoders say so by is_decoder; some decoders leave that at its default, False."""
    config = model.config.get_text_config(decoder=True)
    return config.model_type not in TESTED and getattr(config, "is_decoder", True) is False


def rotations(model: Any) -> list[Tensor | None]:
    """Per layer the angles [d / 2] by which one position turns a key's halves, None where it has no position."""
    if is_own(model):
        from manyheads.hosts.own_cache import own_rotations

        return own_rotations(model)
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if config.model_type not in TESTED:
        raise ValueError(f"{name}: how it rotates keys is not known here; use positions='text'")
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    if len(rotary) != 1:
        raise ValueError(f"{name} has no rotary positions that could be moved; use positions='text'")
    rotated = getattr(config, "no_rope_layers", None) or [1] * len(kinds)
    found: list[Tensor | None] = []
    for kind, turns in zip(kinds, rotated, strict=True):
        own = rotary[0].rope_type
        if (own[kind] if isinstance(own, dict) else own) in ("dynamic", "longrope"):
            raise ValueError(f"{name}: its rotary angles change with the length; use positions='text'")
        angles = getattr(rotary[0], f"{kind}_inv_freq") if isinstance(own, dict) else rotary[0].inv_freq
        found.append(angles.double() if turns else None)
    return found
