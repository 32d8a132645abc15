"""Conversions that need no calibration, one file of weights after the other: memory holds one, however large the model.

Every tensor of the result is made of one tensor of the source (of one file), in the source's dtype: key/value heads are
pooled by mean or first, or heads cut by scores that are given. Nothing is measured, as that would take the model; what
is checked before the folder appears is that every weight of the class is there, of its shape.
"""

from __future__ import annotations

import copy
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.grouped import check_kv_heads, pooled
from manyheads.convert.layout import FUSED, Attention, attentions
from manyheads.convert.pruned import check_saved, kept_heads, kept_rows, per_layer, shaped
from manyheads.convert.saving import TOKENIZERS, card, copy_beside, drafted, file_hash, write_record
from manyheads.hosts.quiet import quiet
from manyheads.runs.environment import environment
from manyheads.runs.given import read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.(.+)")


class Change(ABC):
    """What becomes of the attention's tensors, one at a time."""

    @abstractmethod
    def target(self, model: Any) -> tuple[Any, Any]:
        """Configuration and class of what a model (its weights are not there) becomes; ValueError where it cannot."""

    @abstractmethod
    def part(self, place: int, layer: Attention, name: str, held: Tensor) -> Tensor:
        """`q_proj.weight` or the like of a layer -> what it becomes."""

    @property
    @abstractmethod
    def title(self) -> str: ...


@dataclass(frozen=True)
class Pooling(Change):
    """See `grouped`."""

    kv_heads: int
    align: str = "mean"

    def __post_init__(self) -> None:
        if self.align not in ("mean", "first"):
            raise ValueError(f"--align {self.align!r} takes the whole model; one file after the other: mean or first")

    def target(self, model: Any) -> tuple[Any, Any]:
        check_kv_heads(model, self.kv_heads)
        config = copy.deepcopy(model.config)
        config.num_key_value_heads = self.kv_heads
        return config, type(model)

    def part(self, place: int, layer: Attention, name: str, held: Tensor) -> Tensor:
        return pooled(held, layer, self.kv_heads, self.align) if name.startswith(("k_proj", "v_proj")) else held

    @property
    def title(self) -> str:
        return f"gqa {self.kv_heads}, {self.align}"


class Cutting(Change):
    """Heads by scores [layers, heads], as many in every layer; see `pruned`."""

    def __init__(self, heads: int, scores: Sequence[Sequence[float]]) -> None:
        self.heads, self.scores = heads, scores
        self.kept: list[list[int]] = []

    def target(self, model: Any) -> tuple[Any, Any]:
        own, groups = per_layer(model, self.heads)
        check_saved(model, own)
        layers = attentions(model)
        if [len(row) for row in self.scores] != [layer.heads for layer in layers]:
            raise ValueError(
                f"--scores: want {len(layers)} lists of {layers[0].heads} numbers, one per head of "
                f"{type(model).__name__}; got {len(self.scores)} of {sorted({len(row) for row in self.scores})}"
            )
        self.kept = kept_heads(model, self.heads, torch.tensor(self.scores, dtype=torch.float64))
        return shaped(model, own, groups)

    def part(self, place: int, layer: Attention, name: str, held: Tensor) -> Tensor:
        size = layer.heads // layer.kv_heads
        shared = name.startswith(("k_proj", "v_proj"))
        heads = sorted({head // size for head in self.kept[place]}) if shared else self.kept[place]
        if "_norm" in name:
            return held
        return kept_rows(name, held, layer, heads)

    @property
    def title(self) -> str:
        return f"{self.heads} heads, by given scores"


def read_scores(path: Path) -> list[list[float]]:
    """A JSON list of layers, each a list of a number per head."""
    found = read_json(path)
    rows = found if isinstance(found, list) else []
    if not rows or not all(isinstance(row, list) and all(type(v) in (int, float) for v in row) for row in rows):
        raise ValueError(f"--scores {path}: want a JSON list of layers, each a list of one number per head")
    if not all(-float("inf") < value < float("inf") for row in rows for value in row):
        raise ValueError(f"--scores {path}: a score is no finite number")
    return rows


@torch.no_grad()
def stream(source: Path, out: Path, change: Change) -> dict[str, Any]:
    """Converts a folder into `out`, file by file, and returns the record. The source is left as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (source / "config.json").is_file():
        raise ValueError(f"{source} is no folder with config.json: --stream reads a checkpoint's own files")
    files = shard_files(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{source} is quantised: its files hold numbers without the scales that belong to them, which cannot be "
            "pooled or cut one by one; write it in bfloat16 first, or convert it without --stream"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    made_config, made_class = change.target(model)
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in made_class(made_config).state_dict().items()}
    made_config.architectures = [made_class.__name__]
    layers = attentions(model)
    with drafted(out, str(source)) as draft:
        places, hashes, size = _write(source, draft, files, change, layers, wanted)
        lacking = sorted(wanted.keys() - places.keys() - set(_tied(made_class, made_config)))
        if lacking:
            raise ValueError(f"{source} has no weights for {lacking[0]}: give a whole checkpoint")
        if len(files) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (draft / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        with quiet():
            made_config.save_pretrained(draft)
        copy_beside(source, draft, ("generation_config.json", *TOKENIZERS))
        record = {
            "title": change.title,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": {"name": str(source)},
            "method": "stream",
            "class": made_class.__name__,
            "rows": [],
            "files": hashes,
            "environment": environment(),
        }
        write_record(draft, record)
        (draft / "README.md").write_text(card(record, made_class.__name__), encoding="utf-8")
    return record


def shard_files(folder: Path) -> list[str]:
    """The files of a checkpoint's weights, all of them there; ValueError for a half-written folder."""
    if (folder / WHOLE).is_file():
        return [WHOLE]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has neither {WHOLE} nor {INDEX}: give a folder that save_pretrained wrote")
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) and "/" not in v for v in places.values()):
        raise ValueError(f"{folder / INDEX} is no index of weights")
    files = sorted(set(places.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is half there: {missing[0]} is missing, of {len(files)} files; fetch it again")
    return files


def _write(
    source: Path,
    draft: Path,
    files: Sequence[str],
    change: Change,
    layers: Sequence[Attention],
    wanted: dict[str, tuple[int, ...]],
) -> tuple[dict[str, str], dict[str, str], int]:
    """Which file holds which tensor, the files' hashes, and bytes in all."""
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    hashes, size = {}, 0
    for name in files:
        held = {}
        for key, value in _changed(source / name, change, layers, wanted):
            if tuple(value.shape) != wanted[key]:
                raise ValueError(
                    f"{source / name}: {key} becomes {list(value.shape)}, and the class wants {list(wanted[key])}: its "
                    "layout is not the one that its config.json says"
                )
            held[key] = value.contiguous()
            size += value.numel() * value.element_size()
            places[key] = name
        if not held:
            continue
        save_file(held, draft / name, metadata={"format": "pt"})
        hashes[name] = file_hash(draft / name)
    return places, hashes, size


def _changed(
    file: Path, change: Change, layers: Sequence[Attention], wanted: Container[str]
) -> Iterator[tuple[str, Tensor]]:
    """What the class reads of a file: older ones hold rotary angles too, and others heads that it has not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            for key in filter(wanted.__contains__, opened.keys()):
                yield key, _tensor(key, opened.get_tensor(key), change, layers)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or half-written ({error}): fetch it again") from error


def _tensor(key: str, held: Tensor, change: Change, layers: Sequence[Attention]) -> Tensor:
    found = _ATTENTION.fullmatch(key)
    if found is None:
        return held
    place, part = int(found[1]), found[2]
    layer = layers[place]
    name, _, kind = part.partition(".")
    if name != FUSED:
        return change.part(place, layer, part, held)
    return torch.cat([change.part(place, layer, f"{one}.{kind}", held[rows]) for one, rows in layer.rows().items()])


def _tied(cls: Any, config: Any) -> list[str]:
    return list(cls._tied_weights_keys or ()) if config.tie_word_embeddings else []
