"""Tiny models that read pictures, random and with weights large enough that attention matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

IMAGE, PATCHES, VOCAB = 90, 16, 96
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 24,
    "initializer_range": 0.2,
    "initializer_factor": 4.0,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 95,
    "pad_token_id": 0,
}


def llava() -> Any:
    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=0,
        eos_token_id=95,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            linear.weight.mul_(4)
    return model


def clip() -> Any:
    torch.manual_seed(4)
    text = {**TEXT, "num_hidden_layers": 2, "projection_dim": 24, "initializer_factor": 4.0}
    for name in ("num_key_value_heads", "head_dim"):
        text.pop(name)
    return CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=24)).eval()


def shown(texts: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """A prompt per row: two words, a picture, the row's words; padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[5, 6, *([IMAGE] * PATCHES), *words] for words in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(len(rows), 3, 16, 16, generator=generator),
    }


def row_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row alone, without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {
        "input_ids": inputs["input_ids"][row, real][None],
        "attention_mask": inputs["attention_mask"][row, real][None],
        "pixel_values": inputs["pixel_values"][row : row + 1],
    }
