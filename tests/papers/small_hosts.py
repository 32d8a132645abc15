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


def checkpointed(model: Any, reentrant: bool | None, **options: Any) -> Any:
    """In training mode; reentrant None: without gradient checkpointing."""
    model.train()
    if reentrant is not None:
        # The older releases have the second name alone, the newer ones warn of it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        names = inspect.signature(enable).parameters
        enable(**{next(name for name in names if name.endswith("_kwargs")): {"use_reentrant": reentrant, **options}})
    return model


IMAGE = 60


def llava(**changes: Any) -> Any:
    """Pictures of 16 x 16 in patches of 8: four image tokens each."""
    torch.manual_seed(7)
    vision = transformers.CLIPVisionConfig(**WIDE, num_hidden_layers=1, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(
        **WIDE,
        num_hidden_layers=2,
        vocab_size=61,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        **changes,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def bart(**changes: Any) -> Any:
    torch.manual_seed(7)
    settings = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "init_std": 0.2,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 61,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        "forced_eos_token_id": None, **changes,
    }  # fmt: skip
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**settings)).eval()


def detr(**changes: Any) -> Any:
    torch.manual_seed(7)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, num_queries=12,
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_labels=3, dropout=0.0, **changes,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)
