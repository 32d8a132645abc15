"""Tiny random hosts that forms of training are tried on, and batches with padding for them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from tiny_families import prompt, tiny

WIDE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def llama(layers: int = 2, **changes: Any) -> Any:
    return tiny("llama", num_hidden_layers=layers, **changes)


def bert(**changes: Any) -> Any:
    torch.manual_seed(7)
    settings = {**WIDE, "num_hidden_layers": 2, "vocab_size": 61, "initializer_range": 0.2, **changes}
    return transformers.BertModel(transformers.BertConfig(**settings))


def vit(std: float = 0.2, **changes: Any) -> Any:
    torch.manual_seed(7)
    settings = {**WIDE, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4, "initializer_range": std, **changes}
    return transformers.ViTModel(transformers.ViTConfig(**settings), add_pooling_layer=False)


def padded_batch(rows: int = 2, length: int = 9, left: bool = True) -> dict[str, torch.Tensor]:
    """The last row has three padded places."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, :3] = 0
    return {"input_ids": prompt(rows, length), "attention_mask": mask if left else mask.flip(1)}


def checkpointed(model: Any, reentrant: bool | None) -> Any:
    """In training mode; reentrant None: without gradient checkpointing."""
    model.train()
    if reentrant is not None:
        # The older releases have the second name alone, the newer ones warn of it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        names = inspect.signature(enable).parameters
        enable(**{next(name for name in names if name.endswith("_kwargs")): {"use_reentrant": reentrant}})
    return model
