"""A picture's file as the numbers that a model gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.image_files import image_processor, opened_image
from manyheads.hosts.loading import Loaded
from manyheads.runs.given import read_json

FILE = "preprocessor_config.json"


def pictured(loaded: Loaded, path: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """The image as the model gets it, RGB or grey, and the pixels [1, channels, height, width]: what the image
    processor beside the model makes of it, or else the whole picture at the size that the model wants."""
    import numpy as np
    from PIL import Image

    config = loaded.model.config
    told, channels = _told(loaded), getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", None) or _processed(told)
    names = {"image_processor_type", "feature_extractor_type"} & told.keys()
    reads = getattr(loaded.model, "main_input_name", "pixel_values") == "pixel_values"
    if not reads or (size is None and not names) or channels not in (1, 3):
        raise ValueError(
            f"{loaded.name} reads no images: give --text, or a vision model with image_size in its config, or with "
            f"crop_size or size in its {FILE}"
        )
    image = opened_image(path).convert("L" if channels == 1 else "RGB")
    if names:
        return _by_processor(image_processor(loaded.where or loaded.name), image, channels)
    height, width = (size, size) if isinstance(size, int) else size
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    pixels = pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)
    mean, spread = _normalisation(told, channels)
    return image, {"pixel_values": ((pixels - mean) / spread)[None]}


def _told(loaded: Loaded) -> dict[str, Any]:
    """What the file beside the model says; nothing where there is none."""
    from transformers.utils import cached_file

    where = loaded.where or loaded.name
    path = Path(where) / FILE
    if loaded.where is not None and not Path(where).is_dir():
        held = cached_file(
            where,
            FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        path = path if held is None else Path(held)
    try:
        found = read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _by_processor(processor: Any, image: Any, channels: int) -> tuple[Any, dict[str, Tensor]]:
    from PIL import Image

    made = processor(image, return_tensors="pt")["pixel_values"]
    if not isinstance(made, Tensor) or made.ndim != 4 or tuple(made.shape[:2]) != (1, channels):
        shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"{type(processor).__name__} makes {shape} of a picture; want [1, {channels}, height, width]")
    pixels = made.float()
    seen = pixels[0]
    if getattr(processor, "do_normalize", False):
        mean, spread = _normalisation(processor.to_dict(), channels)
        seen = seen * spread + mean
    if getattr(processor, "do_rescale", False):
        seen = seen / processor.rescale_factor
    levels = seen.round().clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy()
    return Image.fromarray(levels[..., 0] if channels == 1 else levels), {"pixel_values": pixels}


def _processed(told: dict[str, Any]) -> Any:
    """Height and width that the folder's file makes of a picture; None where it names none."""
    for key in ("crop_size", "size"):
        own = told.get(key)
        if isinstance(own, dict):
            own = (own["height"], own["width"]) if {"height", "width"} <= set(own) else own.get("shortest_edge")
        sides = [own] if isinstance(own, int) else list(own or ())
        if sides and all(isinstance(side, int) and side > 0 for side in sides):
            return own
    return None


def _normalisation(told: dict[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """Mean and spread per channel; 0.5 and 0.5 where nothing is told."""
    try:
        each = [told.get(key, [0.5] * channels) for key in ("image_mean", "image_std")]
        mean, spread = (torch.tensor(own, dtype=torch.float32).view(channels, 1, 1) for own in each)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{FILE} has no image_mean and image_std of {channels} numbers: {error}") from error
    return mean, spread
