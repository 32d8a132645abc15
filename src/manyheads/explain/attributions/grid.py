"""Tokens of a vision model as the grid of patches that they are."""

from __future__ import annotations

from torch import Tensor, nn

from manyheads.explain.attributions.feed import Feed


def patches(model: nn.Module, pixels: Tensor | None = None) -> tuple[int, int]:
    """Rows and columns of a vision model's patches, of these pixels [b, c, height, width] or of its own image size."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    size, image = getattr(config, "patch_size", None), getattr(config, "image_size", None)
    if pixels is not None:
        image = pixels.shape[-2:]
    if size is None or image is None:
        raise ValueError(f"{type(model).__name__} has no patch_size and image_size in its config: no grid of patches")
    high, wide = (size, size) if isinstance(size, int) else size
    tall, broad = (image, image) if isinstance(image, int) else image
    return tall // high, broad // wide


def token_grid(attribution: Tensor, model: nn.Module, pixels: Tensor | None = None) -> Tensor:
    """[b, tokens] -> [b, rows, columns] of patches: what stands before them (class, registers) is left out."""
    rows, columns = patches(model, pixels)
    if attribution.dim() != 2 or attribution.shape[1] < rows * columns:
        raise ValueError(f"attribution {list(attribution.shape)}: give [b, tokens] with {rows} x {columns} patches")
    return attribution[:, attribution.shape[1] - rows * columns :].unflatten(1, (rows, columns))


def prefix(feed: Feed, stream: str, n: int) -> int:
    """Tokens before the patches."""
    pixels = feed.named.get("pixel_values")
    if pixels is None or pixels.dim() != 4 or (stream != "vision" and feed.named.get("input_ids") is not None):
        return 0
    try:
        rows, columns = patches(feed.model, pixels)
    except ValueError:
        return 0
    return max(0, n - rows * columns)
