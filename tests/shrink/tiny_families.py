"""A tiny random model of every tested family, large weights so that attention matters."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
    "phi3": {"sliding_window": None},
    "gemma2": {
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 8.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {"sliding_window": 6, "layer_types": SLIDING, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "smollm3": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 48},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_oss": {"sliding_window": 6, "layer_types": SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1},
}
_GPT2_OWN = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    settings = {**COMMON, **FAMILIES[family], **changes}
    if family == "gpt2":
        settings = {k: v for k, v in settings.items() if k not in _GPT2_OWN}
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name or "bias" in name:
            torch.nn.init.normal_(parameter)
    return model


def shallow(family: str, **changes: Any) -> PreTrainedModel:
    """The same in two layers: one of each kind, where a family has layers of several."""
    kinds = {"layer_types": SLIDING[:2]} if "layer_types" in FAMILIES[family] else {}
    return tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 2, **kinds, **changes})


def prompt(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def checkpointing(model: Any, reentrant: bool) -> Any:
    """The model in training, computing its layers anew in backward."""
    # The older releases have the second name alone, the newer ones warn of it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    names = inspect.signature(enable).parameters
    enable(**{next(name for name in names if name.endswith("_kwargs")): {"use_reentrant": reentrant}})
    return model.train()
