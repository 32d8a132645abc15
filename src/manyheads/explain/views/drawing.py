"""A drawing as it comes to be: the picture at every step, and where each word of its caption is looked at."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .view import View


def view_drawing(
    pictures: Any,
    guesses: Any,
    maps: Any,
    words: Sequence[str],
    times: Sequence[float],
    *,
    title: str = "Drawing",
    theme: str = "auto",
) -> View:
    """pictures [steps + 1, height, width, 1 or 3] from 0 to 1, the last one the drawing; guesses [steps, ...] likewise,
    what each step takes the end to be; maps [steps, layers, heads, words, rows, columns] of attention; times of steps.
    Every word's maps are kept as 256 levels of its own greatest weight."""
    shares = np.asarray(maps, dtype=np.float64)
    steps, layers, heads, count, rows, columns = shares.shape
    drawn, guessed = (np.asarray(own, dtype=np.float64) for own in (pictures, guesses))
    fits = (len(drawn), len(guessed), count, len(times)) == (steps + 1, steps, len(words), steps)
    if not fits or drawn.shape[1:] != guessed.shape[1:] or drawn.shape[3:] not in ((1,), (3,)):
        raise ValueError(
            f"a drawing of {steps} steps and {count} words, with pictures {drawn.shape}, guesses {guessed.shape}, "
            f"{len(words)} words and {len(times)} times: want one of each, channels 1 or 3"
        )
    if not all(np.isfinite(own).all() for own in (shares, drawn, guessed)):
        raise ValueError("pictures, guesses or maps hold NaN or infinite numbers")
    most = shares.max(axis=(0, 1, 2, 4, 5))
    levels = shares / np.where(most > 0, most, 1)[:, None, None] * 255
    payload = {
        "words": [str(word) for word in words],
        "times": [round(float(time), 4) for time in times],
        "layers": layers,
        "heads": heads,
        "grid": [rows, columns],
        "size": list(drawn.shape[1:]),
        "most": [float(f"{value:.4g}") for value in most],
        "pictures": _packed(drawn * 255),
        "guesses": _packed(guessed * 255),
        "maps": _packed(levels),
    }
    return View("drawing", title, payload, {}, theme)


def _packed(levels: NDArray[np.float64]) -> str:
    return base64.b64encode(levels.clip(0, 255).round().astype(np.uint8).tobytes()).decode()
