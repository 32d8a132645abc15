"""Pictures from outside, bounded before they are read, and what makes a model's numbers of them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from manyheads.hosts.quiet import quiet
from manyheads.runs.given import read_bytes

MOST_IMAGE = 100_000_000  # bytes


def opened_image(path: str | Path) -> Any:
    """The file's PIL picture; ValueError where it is none, is too large, or is of a mode that is no grey or RGB."""
    try:
        return read_image(read_bytes(path, most=MOST_IMAGE), f"--image {path}")
    except OSError as error:
        raise ValueError(f"--image {path} is no image that can be read: {error}") from error


def read_image(data: bytes, what: str) -> Any:
    """The same of bytes that are there already; what: how they are called where they are none. A photo is turned as its
    camera was held, as transformers does."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data)) as opened:
            if opened.width * opened.height > 10**8:
                raise ValueError(f"{what} has {opened.width} x {opened.height} pixels: give one below 100 megapixels")
            if opened.mode not in ("L", "RGB", "RGBA", "P", "1", "LA"):
                raise ValueError(f"{what} is of mode {opened.mode}: convert it to RGB or L first")
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{what} is no image that can be read: {error}") from error


def image_processor(where: str) -> Any:
    """transformers' image processor of a folder or hub name; ValueError where it has none that can be read."""
    from transformers import AutoImageProcessor

    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(where, backend="pil", trust_remote_code=False)
    except Exception as error:  # whatever a file from outside brings to pass
        raise ValueError(
            f"{where} has no image processor that can be read ({error!r}): it wants processor_config.json or "
            "preprocessor_config.json beside the weights"
        ) from error
