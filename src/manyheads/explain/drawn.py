"""A drawing explained: where each word of the caption is looked at, at every step, by every layer and head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyheads.explain.explanation import Explanation
from manyheads.hosts.calls import opened
from manyheads.hosts.loading import Loaded
from manyheads.hosts.sites import choose
from manyheads.hosts.taps import tap

# Maps of a page: its levels are bytes.
MOST_LEVELS = 24_000_000


def draws(model: Any) -> bool:
    """Whether the model makes pictures from captions, in steps that it tells."""
    return callable(getattr(model, "sample", None)) and callable(getattr(model, "corrections", None))


def explain_drawing(
    loaded: Loaded,
    caption: str,
    *,
    layers: Sequence[int] | None = None,
    steps: int = 20,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Explanation:
    """The model draws the caption, from the noise of the seed. layers: of the cross attention; None: all. ValueError
    for a caption that the model does not read, and for more maps than a page holds."""
    from manyheads.explain.views.drawing import view_drawing

    model = loaded.model
    progress("drawing", 0.0)
    pictures, guesses, maps, times = drawn_maps(model, caption, layers=layers, steps=steps, seed=seed)
    words = [model.config.words[i] for i in model.encode([caption])[0][0].tolist()]
    if maps.size > MOST_LEVELS:
        raise ValueError(f"{maps.shape[1]} layers of maps are more than a page holds: name some by --layers")
    report = {
        "model": {"name": loaded.name, "model_type": model.config.model_type},
        "text": caption,
        "words": words,
        "seed": seed,
        "times": times,
        "layers": list(layers) if layers is not None else list(range(maps.shape[1])),
        "sample": _rounded(pictures[-1].squeeze(-1)),
        "word_maps": {
            "steps_words": _rounded(maps.mean((1, 2))),
            "layers_heads_words": _rounded(maps.mean((0, 4, 5))),
            "words": _rounded(maps.mean((0, 1, 2))),
        },
    }
    drawn, guessed = (((own + 1) / 2).clip(0, 1) for own in (pictures, guesses))
    view = view_drawing(drawn, guessed, maps, words, times, title="Words over steps")
    note = f"{loaded.name} draws {caption!r} in {steps} steps, seed {seed}."
    progress("drawn", 1.0)
    return Explanation(f"{loaded.name}: {caption}", note, report, [view])


def drawn_maps(
    model: Any, caption: str, *, layers: Sequence[int] | None = None, steps: int = 20, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
    """pictures [steps + 1, height, width, c], guesses [steps, ...] of what they become, x - t v; maps [steps, layers,
    heads, words, rows, columns], the caption's own cross attention, maps of a UNet's smaller layers repeated to the
    size of its largest; times."""
    chosen = choose(model, layers, kind="cross")
    maps: list[list[Tensor]] = [[] for _ in range(steps)]
    pictures: list[Tensor] = []
    guesses: list[Tensor] = []
    times: list[float] = []

    def read(call: Any) -> None:
        own = opened(call, "word maps").weights()[model.step.conditional][0].float()
        side = math.isqrt(own.shape[1])
        maps[model.step.index].append(own.transpose(1, 2).unflatten(2, (side, -1)))

    def guess(velocity: Tensor, told: Tensor, now: Tensor, step: Any) -> Tensor:
        pictures.append(now[0])
        guesses.append(now[0] - step.time * velocity[0])
        times.append(step.time)
        return velocity

    model.corrections().append(guess)
    try:
        with tap(model, read, layers=layers, kind="cross"):
            pictures.append(model.sample([caption], steps=steps, seed=seed)[0])
    finally:
        model.corrections().remove(guess)
    if any(len(own) != len(chosen) for own in maps):
        raise ValueError(f"{type(model).__name__} attends more than once in a layer and step: no one map is its word's")
    joined = torch.stack([_of_one_size(own) for own in maps])
    last = (torch.stack(own).permute(0, 2, 3, 1).float().numpy() for own in (pictures, guesses))
    drawn, guessed = last
    return drawn, guessed, joined.numpy(), times


def _of_one_size(maps: list[Tensor]) -> Tensor:
    """Maps [heads, words, rows, columns] of layers -> [layers, ...], smaller ones repeated to the largest's size: a
    patch's shares of words stay what they are."""
    side = max(own.shape[-1] for own in maps)
    return torch.stack(
        [own.repeat_interleave(side // own.shape[-1], -1).repeat_interleave(side // own.shape[-1], -2) for own in maps]
    )


def _rounded(values: np.ndarray) -> Any:
    return np.round(values.astype(np.float64), 5).tolist()


def print_drawing(report: dict[str, Any]) -> None:
    """The drawing in characters, and of each word its share of attention and where it is looked at most."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    picture = np.asarray(report["sample"])
    if picture.ndim == 2:
        for row in ((picture.clip(-1, 1) + 1) / 2 * 4).round().astype(int):
            console.print("".join(" ░▒▓█"[level] * 2 for level in row), markup=False)
    maps = np.asarray(report["word_maps"]["words"])
    table = Table(box=SIMPLE_HEAD, title="words, over all steps, layers and heads")
    for header in ("word", "share", "looked at most in", "by (layer, head)"):
        table.add_column(header)
    by_head = np.asarray(report["word_maps"]["layers_heads_words"])
    for place, word in enumerate(report["words"]):
        row, column = np.unravel_index(maps[place].argmax(), maps[place].shape)
        layer, head = np.unravel_index(by_head[..., place].argmax(), by_head.shape[:2])
        where = f"row {row}, column {column} of {maps.shape[1]} x {maps.shape[2]}"
        table.add_row(escape(word), f"{maps[place].mean():.3f}", where, f"{report['layers'][layer]}, {head}")
    console.print(table)
