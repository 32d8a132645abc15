"""A picture's file as the numbers that a model gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.image_files import opened_image
from manyheads.hosts.loading import Loaded
from manyheads.runs.given import read_json


def pictured(loaded: Loaded, path: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """The image as the model gets it, RGB, and the pixels [1, channels, height, width]."""
    import numpy as np
    from PIL import Image

    config = loaded.model.config
    size, channels = getattr(config, "image_size", None) or _processed(loaded.name), getattr(config, "num_channels", 3)
    if size is None or channels not in (1, 3):
        raise ValueError(
            f"{loaded.name} reads no images: give --text, or a vision model with image_size in its config, or with "
            "crop_size or size in its preprocessor_config.json"
        )
    image = opened_image(path).convert("L" if channels == 1 else "RGB")
    height, width = (size, size) if isinstance(size, int) else size
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    pixels = pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)
    mean, spread = _normalisation(loaded.name, channels)
    return image, {"pixel_values": ((pixels - mean) / spread)[None]}


def _processed(name: str) -> Any:
    """Height and width that the folder's preprocessor_config.json makes of a picture; None where it names none."""
    path = Path(name) / "preprocessor_config.json"
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        return None
    for key in ("crop_size", "size"):
        own = found.get(key)
        if isinstance(own, dict):
            own = (own["height"], own["width"]) if {"height", "width"} <= set(own) else own.get("shortest_edge")
        sides = [own] if isinstance(own, int) else list(own or ())
        if sides and all(isinstance(side, int) and side > 0 for side in sides):
            return own
    return None


def _normalisation(name: str, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and spread per channel from the folder's preprocessor_config.json; 0.5 and 0.5 where there is none."""
    path = Path(name) / "preprocessor_config.json"
    try:
        found = read_json(path) if path.is_file() else {}
        each = [found.get(key, [0.5] * channels) for key in ("image_mean", "image_std")]
        mean, spread = (torch.tensor(own, dtype=torch.float32).view(channels, 1, 1) for own in each)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} has no image_mean and image_std of {channels} numbers: {error}") from error
    return mean, spread
