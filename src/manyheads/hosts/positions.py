"""Positions that padding does not move: a row in a batch stands where the row alone would.

A model that is given a mask and no positions counts them through the padding (GPT-2 and its like): the padded row of a
batch is then another text to it. What `generate` does for such models is done here for every other pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def placed(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs by name, with position_ids where padding stands before a token of a row, the model takes them, and
    none are given. Models whose positions have several dimensions read the mask themselves."""
    mask = _mask(named)
    if mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return dict(named)
    found = positions(model, named)
    return dict(named) if found is None else {**named, "position_ids": found}


def positions(model: nn.Module, named: Mapping[str, Any]) -> Tensor | None:
    """Positions [b, n] of the tokens, counted over the mask's real ones; 0 for padding. None where they are given
    already, or the model takes none or makes its own in several dimensions."""
    tokens = _tokens(named)
    if tokens is None or named.get("position_ids") is not None or not _takes(model) or has_rope_index(model):
        return None
    mask = _mask(named)
    real = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device) if mask is None else mask.long()
    return (real.cumsum(-1) - 1).clamp(min=0) + _first(model)


def packed(named: Mapping[str, Any]) -> bool:
    """Whether positions begin anew within a row, which the library reads as several texts where no mask is given."""
    at = named.get("position_ids")
    if named.get("attention_mask") is not None or not isinstance(at, Tensor) or at.dim() != 2:
        return False
    return bool((at.diff(dim=1) != 1).any())


def room(model: nn.Module) -> int | None:
    """How many tokens the model has positions for, less what its table keeps for padding; None where that is open."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return most - _first(model) if isinstance(most, int) else None


def has_rope_index(model: nn.Module) -> bool:
    """Whether the model finds positions in several dimensions (time, height, width) from ids, grids and mask."""
    return any(hasattr(module, "get_rope_index") for module in model.modules())


def _tokens(named: Mapping[str, Any]) -> Tensor | None:
    for name in ("input_ids", "inputs_embeds"):
        found = named.get(name)
        if isinstance(found, Tensor) and found.dim() >= 2:
            return found
    return None


def _mask(named: Mapping[str, Any]) -> Tensor | None:
    """The padding mask [b, n] of these tokens; None with a cache before them, whose positions go on from it."""
    mask, tokens = named.get("attention_mask"), _tokens(named)
    if not isinstance(mask, Tensor) or tokens is None or mask.shape != tokens.shape[:2]:
        return None
    return mask > 0


def _takes(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _first(model: nn.Module) -> int:
    """RoBERTa and its like count from behind the row of their position table that is kept for padding."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
