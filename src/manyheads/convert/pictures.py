"""Classifiers of pictures from the command line: DIMAP on a hierarchical vision transformer, and its cost on images.

The images are scikit-learn's digits, 8 by 8, resized: what comes with the package and no download. A model that knows
other classes is measured against itself alone: how far its expectations move.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.dimap import block_head_scores, dimap, kept_heads, load_dimap, weight_scores
from manyheads.convert.hierarchical import blocks, layout
from manyheads.convert.saving import RECORD, SCHEMA, check_target, copy_beside, drafted, narrowed
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.quiet import quiet
from manyheads.runs.environment import environment
from manyheads.runs.files import write_atomically
from manyheads.runs.given import read_json
from manyheads.runs.tables import Column, Entry, count_text

PAGE = "conversion.html"
IMAGES = "scikit-learn's digits, 8 x 8, resized to the model's images"
AUTO = "AutoModelForImageClassification"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Images that are measured on, at once, kept for check, and turns of timing.
COUNT, AT_ONCE, _KEPT, _TURNS = 128, 32, 2, 3
_EXACT = 2e-3
# Classes of the digits.
_CLASSES = 10


@dataclass(frozen=True)
class Thinned:
    """sparsity: the share of weights that become zero; heads: query heads that stay in all. One of them. allowed: bits
    per image that may be lost, against the model itself. dtype: of the files."""

    sparsity: float | None = None
    heads: int | None = None
    allowed: float | None = None
    dtype: str | None = None

    @property
    def title(self) -> str:
        kept = f"{self.heads} heads" if self.sparsity is None else f"{self.sparsity:.0%} of weights zero"
        return f"{kept}, by dimap"

    def share(self, model: Any) -> float:
        if self.sparsity is not None:
            return self.sparsity
        assert self.heads is not None
        counts = [len(row) for row in block_head_scores(model)]
        if not len(counts) <= self.heads <= sum(counts):
            raise ValueError(
                f"--heads {self.heads}: the model has {sum(counts)} heads in {len(counts)} blocks, each of which keeps "
                f"one: want {len(counts)} to {sum(counts)}"
            )
        return 1 - self.heads / sum(counts)

    def make(self, model: Any) -> Any:
        return dimap(model, self.share(model), structure="heads" if self.sparsity is None else "weights")


def classifies_images(where: str) -> bool:
    """Whether a folder's config names an image classifier."""
    config = Path(where) / "config.json"
    named = read_json(config).get("architectures") if config.is_file() else None
    return isinstance(named, list) and any(str(name).endswith("ForImageClassification") for name in named)


def prune_images(where: str, name: str, how: Thinned, out: Path, *, write: bool) -> dict[str, Any]:
    """Loads, prunes, proves, measures and writes; returns the record. Damaged where it is above `allowed`."""
    check_target(out, where, weights=write)
    loaded = load_model(where, auto=AUTO)
    made = how.make(loaded.model)
    identities = [proved(loaded.model, how)]
    images, labels = digits(loaded.model.config)
    rows = [
        {"title": title, **measure(model, loaded.model, images, labels)}
        for title, model in (("original", loaded.model), (how.title, made))
    ]
    record = {
        "title": how.title, "created": datetime.now(UTC).isoformat(timespec="seconds"), "method": "prune",
        "source": {"name": name, "class": type(loaded.model).__name__},
        "images": {"what": IMAGES, "count": len(images)},
        "settings": {"sparsity": how.sparsity, "heads": how.heads, "max_damage": how.allowed, "dtype": how.dtype},
        "rows": rows, "identities": identities, "environment": environment(),
    }  # fmt: skip
    if write:
        _allow(how, rows)
        with drafted(out, where) as draft:
            _save(narrowed(made, how.dtype or str(_stored(loaded))), loaded, draft, record)
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write(out, record)
        _allow(how, rows)
    return record


def _allow(how: Thinned, rows: Sequence[Mapping[str, Any]]) -> None:
    if how.allowed is not None and not rows[1]["kl_bits"] <= how.allowed:
        from manyheads.convert.run import Damaged

        raise Damaged(
            f"{how.title}: {rows[1]['kl_bits']:.3f} bits per image from the original, more than --max-damage "
            f"{how.allowed}: nothing is written"
        )


@torch.no_grad()
def proved(model: Any, how: Thinned) -> dict[str, Any]:
    """Heads that are gone from the weights, against the same joined with zeros; RuntimeError where they differ."""
    x = torch.randn(2, *_shape(model.config), generator=torch.Generator().manual_seed(0)).to(model.dtype)
    if how.sparsity is not None:
        claim, one, other = "no weight set to zero", dimap(model, 0.0), model
    else:
        claim, one, other = "heads cut against the same heads set to zero", how.make(model), copy.deepcopy(model)
        own = layout(other)
        for block, kept in zip(blocks(other), kept_heads(model, how.share(model)), strict=True):
            attention, joined = block.get_submodule(own.attention), block.get_submodule(own.joined)
            size = getattr(attention, own.size)
            for head in set(range(attention.num_attention_heads)) - set(kept):
                joined.weight[:, head * size : (head + 1) * size] = 0
    before, after = other(x).logits, one(x).logits
    gap = float((after - before).abs().max() / before.abs().max())
    if not gap < _EXACT:
        raise RuntimeError(f"{claim}: logits differ by {gap:.2g} of the largest: a bug of manyheads, please report it")
    return {"claim": claim, "gap": gap}


def _shape(config: Any) -> tuple[int, int, int]:
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return config.num_channels, height, width


def digits(config: Any) -> tuple[Tensor, Tensor]:
    """[COUNT, channels, height, width] from -1 to 1, of those that comparisons evaluate on, and which each is."""
    from manyheads.tasks.digits import scaled, split

    images, labels = split()[1]
    channels, height, width = _shape(config)
    some = scaled(images[:COUNT])["pixel_values"]
    sized = torch.nn.functional.interpolate(some, (height, width), mode="bilinear", align_corners=False)
    return sized.expand(-1, channels, -1, -1), labels[:COUNT]


@torch.no_grad()
def measure(model: Any, original: Any, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """KL in bits per image to the original, how often both find the same class likeliest, the share of digits told
    where the model has their ten classes (else None), weights that are there and not zero, and time."""
    own, other = (_log_probabilities(each, images) for each in (model, original))
    knows = int(model.config.num_labels) == _CLASSES
    return {
        "kl_bits": max(0.0, float((other.exp() * (other - own)).sum(1).mean()) / math.log(2)),
        "top_agreement": float((own.argmax(1) == other.argmax(1)).double().mean()),
        "accuracy": float((own.argmax(1) == labels).double().mean()) if knows else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "zeros": sum(int((model.get_parameter(name) == 0).sum()) for name in weight_scores(original)),
        "time_ratio": _time_ratio(model, original, images[:AT_ONCE]),
    }


def _log_probabilities(model: Any, images: Tensor) -> Tensor:
    parts = [model(part.to(model.dtype)).logits.double() for part in images.split(AT_ONCE)]
    return torch.cat(parts).log_softmax(-1)


def _time_ratio(model: Any, original: Any, images: Tensor) -> float:
    taken: list[list[float]] = [[], []]
    for _ in range(_TURNS):
        for side, each in zip(taken, (model, original), strict=True):
            begun = time.perf_counter()
            each(images.to(each.dtype))
            side.append(time.perf_counter() - begun)
    return median(taken[0]) / median(taken[1])


# -- files -------------------------------------------------------------------------------------------------------------


def _stored(loaded: Loaded) -> str:
    from transformers import AutoConfig

    held = AutoConfig.from_pretrained(loaded.where, trust_remote_code=False).dtype
    return str(loaded.model.dtype if held is None else held).removeprefix("torch.")


def _save(made: Any, loaded: Loaded, draft: Path, record: Mapping[str, Any]) -> None:
    with quiet():
        made.save_pretrained(draft)
    copy_beside(Path(str(loaded.where)), draft, _PROCESSORS)
    kept = {"logits": _kept(made), "dtype": str(made.dtype).removeprefix("torch.")}
    opens = "`manyheads.convert.load_dimap(folder)`" if hasattr(made.config, "heads_kept") else f"`{AUTO}`"
    _write(draft, {**record, "class": type(made).__name__, "sample": kept})
    lines = [
        f"# {record['source']['name']}, converted by manyheads", "", f"{record['title']}. Opens with {opens}.", "",
        f"Measured on {record['images']['count']} of {IMAGES}:", "", "| | KL (bits) | same class |", "|---|---|---|",
        *(f"| {row['title']} | {row['kl_bits']:.4f} | {row['top_agreement']:.1%} |" for row in record["rows"]), "",
    ]  # fmt: skip
    (draft / "README.md").write_text("\n".join(lines), encoding="utf-8")


@torch.no_grad()
def _kept(model: Any) -> list[list[float]]:
    rows: list[list[float]] = model(digits(model.config)[0][:_KEPT].to(model.dtype)).logits.float().tolist()
    return rows


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    from manyheads.runs.page import settings_html, table_html, write_page

    about = {"manyheads": record["environment"].get("manyheads", ""), "created": record["created"]}
    sections = [
        ("damage", "What it costs", table_html(*table(record["rows"]), f"On {record['images']['what']}.")),
        ("source", "Source", settings_html(record["source"])),
        ("settings", "Every setting", settings_html(record["settings"])),
        ("environment", "Environment", settings_html(record["environment"])),
    ]
    drawing: dict[str, Any] = {"specs": {}, "themes": {}, "widest": 0}
    write_page(folder / PAGE, "convert", f"{record['source']['name']}: {record['title']}", about, sections, drawing)
    write_atomically(folder / RECORD, json.dumps({"schema": SCHEMA, **record}, indent=1) + "\n")


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Column], list[list[Entry]]]:
    columns = [
        Column("Model", number=False),
        Column("KL to original", "bits per image"),
        Column("Same class", "both find it likeliest", down=True),
        Column("Digits told", "where its classes are the digits", down=True),
        Column("Weights"),
        Column("Zeros", "among those of blocks"),
        Column("Time", "of the original's"),
    ]
    return columns, [
        [
            Entry(row["title"], row["title"]),
            Entry(f"{row['kl_bits']:.4f}", row["kl_bits"]),
            Entry(f"{row['top_agreement']:.1%}", row["top_agreement"]),
            Entry("" if row["accuracy"] is None else f"{row['accuracy']:.1%}", row["accuracy"]),
            Entry(count_text(row["parameters"]), row["parameters"]),
            Entry(count_text(row["zeros"]), row["zeros"]),
            Entry(f"{row['time_ratio']:.2f}", row["time_ratio"]),
        ]
        for row in rows
    ]


def check_images(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Opens what was written, and says whether its logits are those that were."""
    if "sample" not in record:
        raise ValueError(f"{folder} holds a measurement without weights (--dry-run)")
    fewer = "heads_kept" in read_json(folder / "config.json")
    model = load_dimap(folder) if fewer else load_model(folder, auto=AUTO, dtype=record["sample"]["dtype"]).model
    model = model.to(getattr(torch, record["sample"]["dtype"]))
    again, kept = (torch.tensor(own) for own in (_kept(model), record["sample"]["logits"]))
    gap = float((again - kept).abs().max())
    return {
        "folder": str(folder), "class": type(model).__name__, "stock": not fewer, "largest_difference": gap,
        "equal": gap <= 1e-4 * max(1.0, float(kept.abs().max())), "dtype": record["sample"]["dtype"],
        "identities": record["identities"],
        "engines": {"transformers": "load_dimap(folder) of manyheads.convert" if fewer else AUTO},
    }  # fmt: skip
