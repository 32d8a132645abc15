"""A data set's segmentations on one page: statistics, a scatter of metrics, and attention over every picture.

    IoU of class c = |predicted c and true c| / |predicted c or true c|;   mean IoU over the classes that either has
    accuracy = the share of pixels that are right
    entropy = -sum p log p / log patches, p attention made to sum to one
    inside = attention on patches where the predicted foreground is, by the share of a patch that it covers
Source: SeeBel, arXiv 2312.10933 (dipta007/SeeBel): overlays of attention, statistics of the data set and a scatter of
metrics. It is a view: which statistics are told beside IoU and accuracy is this file's choice.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from manyheads.runs.charts import Plot, theme
from manyheads.runs.page import charts_html, table_html, write_page
from manyheads.runs.tables import Column, Entry

FIGURES = {
    "iou": "mean IoU",
    "accuracy": "accuracy",
    "entropy": "entropy of attention",
    "inside": "attention inside",
    "foreground": "true foreground",
}
# Height and width of a picture on the page.
_SIDE = 160


@dataclass(frozen=True)
class Segmented:
    """One picture: pixels [height, width] or [height, width, 3] of 0 to 1, truth and predicted [height, width] of
    classes with 0 the background, attention [rows, columns] of patches."""

    name: str
    pixels: Tensor
    truth: Tensor
    predicted: Tensor
    attention: Tensor

    def __post_init__(self) -> None:
        size = tuple(self.pixels.shape[:2])
        if self.pixels.dim() not in (2, 3) or any(tuple(own.shape) != size for own in (self.truth, self.predicted)):
            raise ValueError(
                f"{self.name}: pixels {list(self.pixels.shape)}, truth {list(self.truth.shape)}, predicted "
                f"{list(self.predicted.shape)}: want the same height and width for all"
            )
        for what, own in (("truth", self.truth), ("predicted", self.predicted)):
            if own.is_floating_point() or int(own.min()) < 0:
                raise ValueError(f"{self.name}: {what} holds classes: give integers from 0, the background")
        total = self.attention.double().sum()
        if self.attention.dim() != 2 or bool((self.attention < 0).any()) or not 0 < float(total) < math.inf:
            raise ValueError(f"{self.name}: attention {list(self.attention.shape)}: give [rows, columns], not negative")

    def ious(self) -> dict[int, float]:
        """Of every class that the truth or the prediction has."""
        found = {}
        for own in torch.cat([self.truth.flatten(), self.predicted.flatten()]).unique().tolist():
            one, two = self.truth == own, self.predicted == own
            found[int(own)] = float((one & two).sum() / (one | two).sum())
        return found

    def figures(self) -> dict[str, float]:
        """`FIGURES` of this picture."""
        ious = self.ious()
        p = self.attention.double() / self.attention.double().sum()
        most = math.log(p.numel()) or 1.0
        covered = interpolate((self.predicted > 0).double()[None, None], tuple(p.shape), mode="area")[0, 0]
        return {
            "iou": sum(ious.values()) / len(ious),
            "accuracy": float((self.truth == self.predicted).double().mean()),
            "entropy": float(torch.special.entr(p).sum()) / most,
            "inside": float((p * covered).sum()),
            "foreground": float((self.truth > 0).double().mean()),
        }


def segmentation_statistics(pictures: Sequence[Segmented]) -> dict[str, Any]:
    """rows: each picture's figures. mean: over pictures. classes: class -> pictures that have it, its share of all
    pixels, its mean IoU over pictures where the truth or the prediction has it."""
    if not pictures:
        raise ValueError("there are no pictures: give at least one")
    rows: list[dict[str, Any]] = [{"name": own.name, **own.figures()} for own in pictures]
    pixels = sum(own.truth.numel() for own in pictures)
    ious: dict[int, list[float]] = {}
    for own in pictures:
        for name, value in own.ious().items():
            ious.setdefault(name, []).append(value)
    classes = {
        name: {
            "pictures": sum(bool((own.truth == name).any()) for own in pictures),
            "pixels": sum(int((own.truth == name).sum()) for own in pictures) / pixels,
            "iou": sum(values) / len(values),
        }
        for name, values in sorted(ious.items())
    }
    mean = {key: sum(float(row[key]) for row in rows) / len(rows) for key in FIGURES}
    return {"rows": rows, "mean": mean, "classes": classes}


def write_segmentation(pictures: Sequence[Segmented], path: str | Path, title: str = "Segmentation") -> dict[str, Any]:
    """One page that asks nothing of any other file; gives the statistics that it shows."""
    found = segmentation_statistics(pictures)
    drawn = [_scatter(found["rows"], "entropy"), _scatter(found["rows"], "inside")]
    columns = [Column("picture", number=False), *(Column(words) for words in FIGURES.values())]
    lines = [[Entry(row["name"], row["name"]), *(Entry(f"{row[key]:.3f}", row[key]) for key in FIGURES)]
             for row in found["rows"]]  # fmt: skip
    named = [Column("class"), Column("pictures"), Column("share of pixels"), Column("IoU")]
    by_class = [[Entry(str(name), name), Entry(str(own["pictures"]), own["pictures"]),
                 Entry(f"{own['pixels']:.3f}", own["pixels"]), Entry(f"{own['iou']:.3f}", own["iou"])]
                for name, own in found["classes"].items()]  # fmt: skip
    sections = [
        ("pictures", "Pictures", "".join(map(_figure, pictures))),
        ("charts", "Metrics", charts_html(drawn)),
        ("table", "Every picture", table_html(columns, lines, "Shares of one; entropy of the greatest possible.")),
        ("classes", "Classes", table_html(named, by_class, "0 is the background.")),
    ]
    drawing = {
        "specs": {plot.name: plot.spec("container") for plot in drawn},
        "themes": {scheme: theme(scheme) for scheme in ("light", "dark")},
        "widest": 8,
    }
    write_page(Path(path), "explain segmentation", title, {}, sections, drawing)
    return found


def _scatter(rows: Sequence[dict[str, Any]], key: str) -> Plot:
    import altair as alt

    shown = [{name: round(row[name], 6) for name in ("iou", key)} | {"picture": row["name"]} for row in rows]
    drawn = (
        alt.Chart(alt.Data(values=shown))
        .mark_point(size=70)
        .encode(
            x=alt.X(f"{key}:Q", title=FIGURES[key], scale=alt.Scale(zero=False, padding=10)),
            y=alt.Y("iou:Q", title=FIGURES["iou"], scale=alt.Scale(zero=False, padding=10)),
            tooltip=["picture:N", f"{key}:Q", "iou:Q"],
        )
    )
    return Plot(f"iou-{key}", f"IoU and {FIGURES[key]}", "A mark per picture.", drawn)


def _figure(own: Segmented) -> str:
    """The picture, and attention as redness, the wrong pixels as blue over it."""
    shown = [_png(own.pixels if own.pixels.dim() == 3 else own.pixels[..., None].expand(-1, -1, 3)), _png(overlay(own))]
    told = ", ".join(f"{words} {own.figures()[key]:.2f}" for key, words in list(FIGURES.items())[:2])
    images = "".join(
        f'<img src="data:image/png;base64,{data}" width="{_SIDE}" height="{_SIDE}" alt="{escape(own.name)}, {what}"> '
        for data, what in zip(shown, ("the picture", "attention red, wrong pixels blue"), strict=True)
    )
    return f"<figure>{images}<figcaption>{escape(own.name)}: {told}</figcaption></figure>"


def overlay(own: Segmented) -> Tensor:
    """[height, width, 3]: half the picture in grey, half attention over its greatest in red and errors in blue."""
    grey = own.pixels if own.pixels.dim() == 2 else own.pixels.mean(-1)
    heat = interpolate(own.attention.float()[None, None], tuple(grey.shape), mode="nearest")[0, 0]
    wrong = (own.truth != own.predicted).float()
    return torch.stack([grey.float() / 2 + heat / heat.max() / 2, grey.float() / 2, grey.float() / 2 + wrong / 2], -1)


def _png(pixels: Tensor) -> str:
    from PIL import Image

    held = BytesIO()
    data = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    Image.fromarray(data).resize((_SIDE, _SIDE), Image.Resampling.NEAREST).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()
