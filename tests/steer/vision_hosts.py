"""Tiny random LLaVAs, batches of uneven rows, and the whole model with keys hidden: what thinning must equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE = 60
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXTS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "mistral": transformers.MistralConfig,
}


def llava(text: str = "llama", layers: int = 4, **changes: Any) -> Any:
    """Pictures of 24 x 24 in patches of 8: nine image tokens each."""
    torch.manual_seed(7)
    vision = transformers.CLIPVisionConfig(**WIDE, num_hidden_layers=2, image_size=24, patch_size=8)
    own = TEXTS[text](
        **{
            **WIDE, "num_hidden_layers": layers, "vocab_size": 61, "num_key_value_heads": 2, "initializer_range": 0.2,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **changes,
        }
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=own, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval().double()


def batch(pad: str = "left") -> dict[str, Tensor]:
    """Two rows, 15 and 13 tokens long, nine of them of the image."""
    rows = [[1, 5, 6] + [IMAGE] * 9 + [7, 8, 9], [1, 3] + [IMAGE] * 9 + [4, 11]]
    ids, mask = torch.zeros(2, 15, dtype=torch.long), torch.zeros(2, 15, dtype=torch.long)
    for i, row in enumerate(rows):
        own = slice(15 - len(row), 15) if pad == "left" else slice(0, len(row))
        ids[i, own], mask[i, own] = torch.tensor(row), 1
    torch.manual_seed(3)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 24, 24, dtype=torch.float64),
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }


@contextmanager
def hidden(model: Any, gone: dict[int, Tensor], real: Tensor, window: int | None = None) -> Iterator[None]:
    """gone: layer -> [b, n] bool of tokens that left before it or earlier; their keys are seen by no other token."""
    layers = model.model.language_model.layers
    hooks = []

    def hide(index: int) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> Any:
            n = args[0].shape[1]
            seen = torch.zeros(len(args[0]), 1, n, n, dtype=torch.bool)
            for b in range(len(args[0])):
                for i in range(n):
                    for j in range(i + 1):
                        near = window is None or i - j < window
                        seen[b, 0, i, j] = i == j or (near and bool(real[b, j]) and not bool(gone[index][b, j]))
            return args, {**kwargs, "attention_mask": seen}

        return before

    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(hide(index), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def grown(given: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The same batch with so many words after it."""
    mask = torch.cat([given["attention_mask"], torch.ones_like(tokens)], 1)
    return {
        **given,
        "input_ids": torch.cat([given["input_ids"], tokens], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }
