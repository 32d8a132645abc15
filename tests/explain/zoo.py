"""A tiny random model of every kind that taps read, with inputs for it: decoders, encoders, both, vision."""

from __future__ import annotations

from typing import Any

import torch
from tiny_families import FAMILIES, prompt, tiny
from torch import Tensor, nn

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BOTH = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 61, "init_std": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
PICTURE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("AutoModel", {**WIDE, "vocab_size": 61, "initializer_range": 0.2}),
    "distilbert": ("AutoModel", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 61}),
    "vit": ("AutoModel", {**WIDE, **PICTURE, "initializer_range": 0.2}),
    "bart": ("AutoModelForSeq2SeqLM", BOTH),
    "t5": (
        "AutoModelForSeq2SeqLM",
        {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "vocab_size": 61}
        | {"decoder_start_token_id": 0, "relative_attention_num_buckets": 8},
    ),
    "clip": (
        "AutoModel",
        {"text_config": {**WIDE, **SPECIAL, "vocab_size": 61}, "vision_config": {**WIDE, **PICTURE}},
    ),
}
EVERY = [*FAMILIES, *OTHERS]


def build(name: str) -> nn.Module:
    """In eval mode, with the attention that the library chooses for it."""
    import transformers

    if name in FAMILIES:
        return tiny(name)
    auto, settings = OTHERS[name]
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **settings)
    model: nn.Module = getattr(transformers, auto).from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.25)
    return model


def inputs(name: str, rows: int = 2, length: int = 13) -> dict[str, Tensor]:
    """One row of the text is padded: on the left for decoders, on the right for encoders."""
    text = {"input_ids": prompt(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    picture = {"pixel_values": torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    if name in FAMILIES:
        text["attention_mask"][1, :3] = 0
        return text
    text["attention_mask"][1, -3:] = 0
    if name == "vit":
        return picture
    if name in ("bart", "t5"):
        return {**text, "decoder_input_ids": prompt(rows, 7, seed=3)}
    return {**text, **picture} if name == "clip" else text
