"""Who serves a converted checkpoint: by its class, and by what of it an engine is known to drop.

CTranslate2 was run (benchmarks/engines.py). The lists of vLLM and llama.cpp are read from their sources, as of 2026.
"""

from __future__ import annotations

from typing import Any

_COMMON = {"Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi3"}
ENGINES = {
    "CTranslate2": _COMMON,
    "vLLM": _COMMON | {"Olmo2", "DeepseekV3"},
    "llama.cpp": _COMMON | {"Olmo2", "SmolLM3", "DeepseekV3"},
}


def takers(model: Any) -> dict[str, str]:
    """By engine: "yes" where its list has the class, or why it does not take the model."""
    name = type(model).__name__
    stock = type(model).__module__.startswith("transformers.")
    found = {"transformers": "yes" if stock else "with manyheads installed"}
    for engine, classes in ENGINES.items():
        if not stock or name.removesuffix("ForCausalLM") not in classes:
            found[engine] = f"no: it has no {name}"
        else:
            found[engine] = _dropped(engine, model) or "yes"
    return found


def _dropped(engine: str, model: Any) -> str | None:
    config, state = model.config, model.state_dict()
    if config.model_type == "deepseek_v3" and any(".self_attn." in key and key.endswith(".bias") for key in state):
        return "no: it drops the bias that --norm exact needs; convert with --norm fitted"
    apart = getattr(config, "head_dim", None) not in (None, config.hidden_size // config.num_attention_heads)
    if engine == "CTranslate2" and apart and config.model_type in ("llama", "phi3"):
        return "no: it takes a head to have hidden_size / heads features; as_mistral makes a class of it that says"
    return None
