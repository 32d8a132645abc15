"""Tokens of a vision model as the grid of patches that they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.feed import Feed
from manyheads.hosts.patches import Patches, find_patches


def token_grid(attribution: Tensor, model: nn.Module, pixels: Tensor | None = None) -> Tensor:
    """[b, tokens] -> [b, rows, columns] of patches: what stands beside them (class, registers, detection tokens) is
    left out. pixels: those that were explained; without them, a picture of the model's own image size."""
    found = find_patches(model, _blank(model) if pixels is None else pixels)
    if attribution.dim() != 2:
        raise ValueError(f"attribution {list(attribution.shape)}: give [b, tokens], {found.tokens} of them")
    return found.grid(attribution)


def _blank(model: nn.Module) -> Tensor:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError(f"{type(model).__name__} has no image_size in its config: give pixels=")
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=next(model.parameters()).device)


def layout(feed: Feed, stream: str) -> Patches | None:
    """Where the patches are among a stream's tokens; None of a stream that is not a picture's. ValueError where that
    is not known."""
    others = stream in ("decoder", "language") or (stream != "vision" and feed.named.get("input_ids") is not None)
    return None if others or feed.named.get("pixel_values") is None else feed.patches
