"""An explanation of an answer about a picture: the numbers of `sight` as a report, and as views on a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyheads.explain.explanation import Explanation, Progress
from manyheads.explain.sight import STACK, Sight, see, token_divergence
from manyheads.hosts.image_files import opened_image
from manyheads.hosts.seeing import Seeing
from manyheads.hosts.sites import choose

BEST = 5
NOTES = {
    "VHD": "How far the head's output moves when the picture is taken away (arXiv 2412.13949).",
    "on the picture": "Attention on patches, mean over the answer's tokens.",
    "edge on the picture": "What the answer loses, to first order, without the head's looks at patches, in nats.",
    "visual": "Attention on patches of all tokens behind the picture (arXiv 2412.18108).",
    "visual-concentration": "How concentrated that attention is, 0 to 1.",
}


def explain_sight(
    seeing: Seeing,
    path: str | Path,
    text: str,
    *,
    layers: Sequence[int] | None = None,
    page_mb: float = 48,
    progress: Progress = lambda what, share: None,
) -> Explanation:
    """An answer about the picture of a file: which patches and words each of its tokens came from, whether it leans on
    the picture or on the prior, and which heads are visual. ValueError for a picture or a text that cannot be used."""
    choose(seeing.model, layers, STACK, "self")
    picture = opened_image(path).convert("RGB")
    progress("asking with and without the picture", 0.0)
    sight = see(seeing, picture, text)
    progress("heads", 0.4)
    scores = head_scores(sight)
    report = {**sight_report(sight, scores, layers), "image": Path(path).name, "text": text}
    progress("page", 0.7)
    views = _views(sight, scores, layers, page_mb)
    progress("done", 1.0)
    return Explanation(f"{seeing.name}: what it saw", _note(sight), report, views)


def head_scores(sight: Sight) -> dict[str, Tensor]:
    """Name -> [layers, heads]: how visual each head of the language model is, by NOTES' measures."""
    from manyheads.explain.detectors import detect

    rows = {name: own for name, own in sight.inputs.items() if name != "attention_mask"}
    table = detect(sight.seeing.model, ["visual", "visual-concentration"], inputs=rows, stack=STACK)
    return {
        "VHD": sight.divergence.mean(0),
        "on the picture": sight.layout.grid(sight.attention).sum((-1, -2)).mean(0),
        "edge on the picture": sight.layout.grid(sight.edges).sum((-1, -2)).sum(0),
        **{name: own.double().cpu() for name, own in table.scores.items()},
    }


def sight_report(sight: Sight, scores: dict[str, Tensor], layers: Sequence[int] | None = None) -> dict[str, Any]:
    """Plain numbers, fit for JSON."""
    seeing, layout = sight.seeing, sight.layout
    words = _words(sight)
    shown = range(sight.attention.shape[1]) if layers is None else layers
    told = token_divergence(sight.divergence)
    tokens = [
        {
            "token": name,
            "probability": {
                "picture": _round(sight.with_image[number]),
                "without": _round(sight.without_image[number]),
                "blank": _round(sight.blank[number]),
            },
            "gain_bits": _round(sight.gain[number]),
            "divergence": _round(told[number]),
            "patches": _best_patches(sight, sight.sources[number]),
            "words": _best_words(words, sight.sources[number]),
            "patch_map": _numbers(layout.grid(sight.sources[number])),
            "heads": [
                _of_head(sight, words, number, layer, head)
                for layer in shown
                for head in range(sight.attention.shape[2])
            ],
        }
        for number, name in enumerate(seeing.loaded.tokens(sight.answer))
    ]
    return {
        "model": {"name": seeing.name, "model_type": seeing.model.config.model_type},
        "prompt": [own for own in words if own is not None],
        "patches": {"rows": layout.rows, "columns": layout.columns},
        "answer": {
            "text": seeing.tokenizer.decode(sight.answer),
            "without": seeing.tokenizer.decode(sight.said_without),
            "blank": seeing.tokenizer.decode(sight.said_blank),
            "gain_bits": _round(sight.gain.sum()),
            "leans": sight.leans,
        },
        "tokens": tokens,
        "heads": {name: _numbers(own) for name, own in scores.items()},
        "visual_heads": [[layer, head] for layer, head in _ranked(scores["VHD"])[:BEST]],
    }


def _words(sight: Sight) -> list[str | None]:
    """A string for every token of the row that is none of the picture's."""
    ids = sight.inputs["input_ids"][0]
    image = sight.seeing.is_image(ids).tolist()
    names = sight.seeing.loaded.tokens(ids.tolist())
    return [None if own else name for own, name in zip(image, names, strict=True)]


def _best_patches(sight: Sight, values: Tensor) -> list[dict[str, Any]]:
    grid = sight.layout.grid(values)
    best = grid.flatten().argsort(descending=True)[:BEST].tolist()
    return [
        {"row": at // sight.layout.columns, "column": at % sight.layout.columns, "value": _round(grid.flatten()[at])}
        for at in best
    ]


def _best_words(words: Sequence[str | None], values: Tensor) -> list[dict[str, Any]]:
    order = values.argsort(descending=True).tolist()
    best = [at for at in order if words[at] is not None][:BEST]
    return [{"at": at, "token": words[at], "value": _round(values[at])} for at in best]


def _of_head(sight: Sight, words: Sequence[str | None], number: int, layer: int, head: int) -> dict[str, Any]:
    """The patches and words that one head looked at most, and the edges' sums over both."""
    attention, edges = sight.attention[number, layer, head], sight.edges[number, layer, head]
    return {
        "layer": layer,
        "head": head,
        "on_picture": _round(sight.layout.grid(attention).sum()),
        "edge_picture": _round(sight.layout.grid(edges).sum()),
        "edge_words": _round(edges.sum() - sight.layout.grid(edges).sum()),
        "patches": _best_patches(sight, attention)[:3],
        "words": _best_words(words, attention)[:3],
        "divergence": _round(sight.divergence[number, layer, head]),
    }


def _ranked(grid: Tensor) -> list[tuple[int, int]]:
    """(layer, head), the greatest first."""
    heads = grid.shape[1]
    return [(at // heads, at % heads) for at in grid.flatten().argsort(descending=True).tolist()]


def _views(sight: Sight, scores: dict[str, Tensor], layers: Sequence[int] | None, page_mb: float) -> list[Any]:
    from manyheads.explain.views import Panel, read_store, view_heads, view_image, view_maps, view_table, view_text

    answer = [f"{number}: {name!r}" for number, name in enumerate(sight.seeing.loaded.tokens(sight.answer))]
    layout, image = sight.layout, shown_picture(sight)
    maps = {}
    for number, name in enumerate(answer):
        maps[f"{name}, sources"] = layout.grid(sight.sources[number]).clamp_min(0).numpy()
        maps[f"{name}, attention"] = layout.grid(sight.attention[number]).mean((0, 1)).numpy()
    words = _words(sight)
    at = [place for place, own in enumerate(words) if own is not None]
    names = [str(words[place]) for place in at]
    values = {name: sight.sources[number][at].numpy() for number, name in enumerate(answer)}
    store = read_store(sight.seeing.model, sight.inputs, layers=layers, budget_mb=page_mb, stack=STACK, kind="self")
    return [
        view_image(image, maps, title="Which patches"),
        view_text(names, values, title="Which words"),
        view_table({name: own.numpy() for name, own in scores.items()}, notes=NOTES, title="Which heads are visual"),
        view_maps({name: own.numpy() for name, own in scores.items()}, title="Heads by layer"),
        view_heads(Panel(store, _named(sight, words)), title="Every head"),
    ]


def _named(sight: Sight, words: Sequence[str | None]) -> list[str]:
    """Tokens by word, patches by row.column."""
    first, columns = sight.layout.first, sight.layout.columns
    return [
        own if own is not None else ("[CLS]" if at < first else f"{(at - first) // columns}.{(at - first) % columns}")
        for at, own in enumerate(words)
    ]


def shown_picture(sight: Sight) -> Any:
    """[height, width, 3] in 0 to 1: what the model got, cropped and scaled as its processor does it."""
    pixels = sight.inputs["pixel_values"][0].detach().float().cpu()
    images = sight.seeing.images
    if getattr(images, "do_normalize", False):
        mean, spread = (torch.tensor(own).view(-1, 1, 1) for own in (images.image_mean, images.image_std))
        pixels = pixels * spread + mean
    return pixels.clamp(0, 1).permute(1, 2, 0).numpy()


def _note(sight: Sight) -> str:
    decode = sight.seeing.tokenizer.decode
    lean = "leans on the picture" if sight.leans == "image" else "leans on the prior"
    return (
        f"Answer: {decode(sight.answer)!r}, which {lean}: without the picture {decode(sight.said_without)!r}, with a "
        f"blank one {decode(sight.said_blank)!r}; the picture adds {float(sight.gain.sum()):.1f} bits."
    )


def _round(value: Any) -> float:
    return float(f"{float(value):.6g}")


def _numbers(grid: Tensor) -> Any:
    found = np.asarray(grid.detach().cpu())
    return [[_round(value) for value in row] for row in found]


def print_sight(report: dict[str, Any]) -> None:
    """The terminal's table: a line for each token of the answer, and the most visual heads."""
    import sys

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    own = report["answer"]
    lean = "picture" if own["leans"] == "image" else "prior"
    console.print(
        escape(
            f"answer: {own['text']!r}, leans on the {lean} ({own['gain_bits']:+.1f} bits); without the picture: "
            f"{own['without']!r}, with a blank one: {own['blank']!r}"
        )
    )
    table = Table(box=SIMPLE_HEAD, title="where each token came from")
    for header in ("token", "p", "p without", "p blank", "patches (row.column)", "words"):
        table.add_column(header)
    for token in report["tokens"]:
        shares = token["probability"]
        table.add_row(
            escape(repr(token["token"])),
            *(f"{shares[key]:.1%}" for key in ("picture", "without", "blank")),
            " ".join(f"{patch['row']}.{patch['column']}" for patch in token["patches"]),
            escape(" ".join(f"{word['token']!r}@{word['at']}" for word in token["words"])),
        )
    console.print(table)
    grid = report["heads"]["VHD"]
    heads = ", ".join(f"{layer}.{head} ({grid[layer][head]:.2f})" for layer, head in report["visual_heads"])
    console.print(f"most visual heads (layer.head, divergence): {heads}")
