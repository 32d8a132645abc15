"""Views of numbers: flow through the layers, values on text and on images, maps and a table over layers and heads.

Flow: attention rollout followed from one token down, along the strongest links (Abnar and Zuidema, arXiv 2005.00928):
each layer hands on (A + I) / 2, A the mean over heads. Divergence: links and tokens beyond the strongest are dropped
and their share is said, where rollout multiplies whole matrices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .attention import Panel, checked_tokens
from .chunks import deflate
from .store import AttentionStore, rounded
from .view import View

# An image is shown at most this many pixels wide or tall.
SIDE = 1024
NOTES = {
    "Entropy": "Entropy of a row's weights in nats, mean over rows.",
    "Distance": "Tokens between the one that looks and those it looks at, by weight, mean over rows.",
    "Kept": "Share of the rows' mass that this page keeps.",
}


def view_flow(
    store: AttentionStore, tokens: Sequence[str], *, token: int = -1, title: str = "Flow", theme: str = "auto"
) -> View:
    """Where a token's last layer comes from, layer by layer. store: self-attention; its heads' mean is taken unless it
    holds that already (`mean=True`). token: the one that is shown first."""
    if store.n != store.m:
        raise ValueError(f"flow needs self-attention; the store has {store.n} queries and {store.m} keys")
    if not -store.n <= token < store.n:
        raise ValueError(f"token {token} of {store.n}; choose one from 0 to {store.n - 1}")
    if len(store.heads) > 1:
        store = store.mean_heads()
    key = store.key
    payload = {"panel": Panel(store, tokens).spec(key), "token": token % store.n}
    return View("flow", title, payload, store.blobs(key), theme)


def view_text(
    tokens: Sequence[str],
    values: Mapping[str, Any] | Any,
    *,
    title: str = "Attribution",
    theme: str = "auto",
) -> View:
    """Tokens in the colour of their values [n]; several methods by name."""
    if len(tokens) == 0:
        raise ValueError("there are no tokens to show")
    names = checked_tokens(tokens, len(tokens), "values")
    methods = []
    for name, given in _named(values, "Value").items():
        numbers = _finite(given, f"{name}: values")
        if numbers.shape != (len(names),):
            raise ValueError(f"{name}: values have shape {numbers.shape} for {len(names)} tokens; give one for each")
        methods.append({"name": name, "values": _digits(numbers)})
    return View("text", title, {"tokens": names, "methods": methods}, {}, theme)


def view_image(image: Any, maps: Mapping[str, Any] | Any, *, title: str = "Image", theme: str = "auto") -> View:
    """Maps [rows, columns] of patches over an image: PIL (L or RGB), or [H, W] or [H, W, 3], uint8 or in [0, 1]."""
    pixels = _pixels(image)
    shown = []
    for name, given in _named(maps, "Value").items():
        numbers = _finite(given, f"{name}: the map")
        if numbers.ndim != 2 or numbers.size == 0:
            raise ValueError(f"{name}: the map has shape {numbers.shape}; give [rows of patches, columns of patches]")
        shown.append({"name": name, "values": _digits(numbers)})
    data = deflate(pixels.tobytes())
    name = hashlib.blake2b(data, digest_size=6).hexdigest()
    payload = {"image": name, "height": pixels.shape[0], "width": pixels.shape[1], "maps": shown}
    return View("image", title, payload, {name: data}, theme)


def maps_of(store: AttentionStore) -> dict[str, NDArray[np.float32]]:
    """What a store knows of its heads, from the exact weights: entropy, distance (self-attention), share kept."""
    found = {"Entropy": store.entropy, "Kept": store.share}
    return found if store.distance is None else {"Distance": store.distance, **found}


def view_maps(
    maps: Mapping[str, Any] | AttentionStore,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    title: str = "Maps",
    theme: str = "auto",
) -> View:
    """One number per head [layers, heads], as heatmaps. From a store: attention distance, entropy, and what is kept."""
    if isinstance(maps, AttentionStore):
        layers, heads, maps = layers or maps.layers, heads or maps.heads, maps_of(maps)
    grids, layers, heads = _grids(maps, layers, heads)
    shown = [{"name": name, "values": _gaps(grid), "note": NOTES.get(name, "")} for name, grid in grids.items()]
    return View("maps", title, {"layers": layers, "heads": heads, "maps": shown}, {}, theme)


def view_table(
    scores: Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    notes: Mapping[str, str] | None = None,
    sort: str | None = None,
    title: str = "Heads",
    theme: str = "auto",
) -> View:
    """One row per head, one column per score [layers, heads] (NaN: none), sorted by `sort` first, or by the first."""
    grids, layers, heads = _grids(scores, layers, heads)
    names = list(grids)
    if sort is not None and sort not in names:
        raise ValueError(f"sort={sort!r} is no column; there are {', '.join(names)}")
    shown = [_gaps(grid) for grid in grids.values()]
    rows = [
        [layer, head, *(grid[row][h] for grid in shown)]
        for row, layer in enumerate(layers)
        for h, head in enumerate(heads)
    ]
    columns = [{"name": name, "note": (notes or {}).get(name, "")} for name in names]
    start = 2 + (names.index(sort) if sort is not None else 0)
    return View("table", title, {"columns": columns, "rows": rows, "sort": start}, {}, theme)


def _named(values: Any, name: str) -> dict[str, Any]:
    found = {str(key): value for key, value in values.items()} if isinstance(values, Mapping) else {name: values}
    if not found:
        raise ValueError("there are no values to show")
    return found


def _array(values: Any) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _finite(values: Any, what: str) -> NDArray[np.float64]:
    found = _array(values)
    if not np.isfinite(found).all():
        raise ValueError(f"{what} hold NaN or infinite numbers")
    return found


def _digits(numbers: NDArray[np.float64]) -> list[Any]:
    """Six significant digits: what is shown has three."""
    size = float(np.abs(numbers).max()) if numbers.size else 0.0
    return rounded(numbers, 6 - int(np.floor(np.log10(size))) if size > 0 else 6)


def _gaps(grid: NDArray[np.float64]) -> list[list[float | None]]:
    digits = _digits(np.nan_to_num(grid))
    return [
        [None if np.isnan(value) else shown for value, shown in zip(line, row, strict=True)]
        for line, row in zip(grid, digits, strict=True)
    ]


def _grids(
    maps: Mapping[str, Any], layers: Sequence[int] | None, heads: Sequence[int] | None
) -> tuple[dict[str, NDArray[np.float64]], list[int], list[int]]:
    grids = {name: _array(values) for name, values in _named(maps, "Value").items()}
    shape = next(iter(grids.values())).shape
    for name, grid in grids.items():
        if grid.ndim != 2 or grid.size == 0 or grid.shape != shape:
            raise ValueError(f"{name} has shape {grid.shape}; give [layers, heads], the same for all (first: {shape})")
        if np.isinf(grid).any():
            raise ValueError(f"{name} holds infinite numbers; NaN stands for a head without a value")
    rows = list(range(shape[0])) if layers is None else [int(layer) for layer in layers]
    columns = list(range(shape[1])) if heads is None else [int(head) for head in heads]
    if (len(rows), len(columns)) != shape:
        raise ValueError(f"{len(rows)} layers and {len(columns)} heads are named for maps of shape {shape}")
    return grids, rows, columns


def _pixels(image: Any) -> NDArray[np.uint8]:
    """[H, W, 3] uint8, no side above SIDE."""
    mode = getattr(image, "mode", None)
    if isinstance(mode, str) and mode not in ("L", "RGB"):
        raise ValueError(f"an image of mode {mode}; convert it first: image.convert('RGB')")
    found = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if found.ndim == 2:
        found = np.stack([found] * 3, -1)
    if found.ndim != 3 or found.shape[2] != 3 or found.size == 0:
        raise ValueError(f"an image of shape {found.shape}; give [H, W] or [H, W, 3] with colours last")
    if found.dtype != np.uint8:
        if not (np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1):
            raise ValueError(f"pixels of {found.dtype} from {found.min()} to {found.max()}; give uint8, or 0 to 1")
        found = (found * 255).round().astype(np.uint8)
    step = max(found.shape[:2]) / SIDE
    if step > 1:
        rows, columns = (np.floor(np.arange(int(side / step)) * step).astype(int) for side in found.shape[:2])
        found = found[rows][:, columns]
    return np.ascontiguousarray(found)
