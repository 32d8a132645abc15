"""A tiny Llama and a prompt made by integer arithmetic, so that no generator of random numbers has a say in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SETTINGS: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
PROMPT = 96
_WORD = 2**32 - 1


def numbers(shape: tuple[int, ...], salt: int) -> Tensor:
    """float64 from -1 to 1, whose bits are mixed from the index and a salt."""
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    x = (x + salt * 1_000_003 + 1) * 0x9E3779B1 & _WORD
    x = (x ^ x >> 16) * 0x85EBCA6B & _WORD
    x = (x ^ x >> 13) * 0x42B2AE35 & _WORD
    return ((x ^ x >> 16).double() / 2**31 - 1).view(shape)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """For every parameter, in the order of their names; norms around one."""
    made = {}
    for salt, name in enumerate(sorted(shapes)):
        own = numbers(shapes[name], salt)
        made[name] = 1 + own / 4 if len(shapes[name]) == 1 else own / 3
    return made


def prompt() -> Tensor:
    return numbers((1, PROMPT, SETTINGS["hidden_size"]), 999)
