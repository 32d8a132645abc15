"""Pictures from outside, bounded before they are read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from manyheads.runs.given import read_bytes

MOST_IMAGE = 100_000_000  # bytes


def opened_image(path: str | Path) -> Any:
    """The file's PIL picture; ValueError where it is none, is too large, or is of a mode that is no grey or RGB."""
    try:
        return read_image(read_bytes(path, most=MOST_IMAGE), f"--image {path}")
    except OSError as error:
        raise ValueError(f"--image {path} is no image that can be read: {error}") from error


def read_image(data: bytes, what: str) -> Any:
    """The same of bytes that are there already; what: how they are called where they are none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data)) as opened:
            if opened.width * opened.height > 10**8:
                raise ValueError(f"{what} has {opened.width} x {opened.height} pixels: give one below 100 megapixels")
            if opened.mode not in ("L", "RGB", "RGBA", "P", "1", "LA"):
                raise ValueError(f"{what} is of mode {opened.mode}: convert it to RGB or L first")
            opened.load()
            return opened.copy()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{what} is no image that can be read: {error}") from error
