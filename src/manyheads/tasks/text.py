"""Byte-level language modelling on text that every Python has: the sources of its own standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from manyheads.tasks.draw import generator, uniform
from manyheads.tasks.task import MAX_LENGTH, Batch, Task, bits, register_task, whole

# Tests and installed packages are no part of the library. `encodings` holds some hundred near-copies of one table
# and `pydoc_data` one huge generated file: a split by file would not keep the former's evaluation text unseen.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
_MADE_HERE = "_sysconfigdata"  # written when this Python was built: full of its own paths
_EVAL_IN = 10  # one file of so many goes to the evaluation
_BETWEEN_FILES = b"\0"


@register_task
@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Predict the next byte of Python source. Scored in bits per byte: 8 is a uniform guess, lower is better.

    The `.py` files under the standard library (or `folder`) are taken in the order of a hash of their relative paths
    until max_bytes are read; the same hash sends one file of ten to the evaluation, so the split is by whole files and
    the same everywhere. Training windows of n + 1 bytes start anywhere; evaluation windows, at most eval_windows of
    them, do not overlap. Another version of Python is another text: compare within one.
    """

    name: ClassVar[str] = "text"
    title: ClassVar[str] = "Text (bytes of the Python standard library)"
    pattern: ClassVar[str] = "causal-self"
    metric: ClassVar[str] = "bits_per_byte"
    higher_is_better: ClassVar[bool] = False

    n: int = 256
    max_bytes: int = 4_000_000
    eval_windows: int = 256
    folder: str = ""

    def __post_init__(self) -> None:
        whole(self, "n", self.n, 1, MAX_LENGTH)
        whole(self, "max_bytes", self.max_bytes, 1, 1 << 30)
        whole(self, "eval_windows", self.eval_windows, 1, 1_000_000)
        if not isinstance(self.folder, str):
            raise ValueError(f"text: folder={self.folder!r}; want a path as text, or '' for the standard library")

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": 256, "max_length": self.n}

    def train_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        text = self._long_enough(0)
        rng = generator(self.name, "train", index(seed))
        return iter(lambda: self._windows(text, uniform(batch_size, 1, 0, len(text) - self.n, rng)), None)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        text = self._long_enough(1)
        room = (len(text) - 1) // self.n
        count = min(self.eval_windows, room)
        starts = torch.arange(count)[:, None] * room // count * self.n
        return (self._windows(text, some) for some in starts.split(batch_size))

    def score(self, logits: Tensor, targets: Tensor) -> tuple[float, int]:
        return bits(*self.asked(logits, targets))

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        window = text[starts + torch.arange(self.n + 1)].long()
        return Batch({"input_ids": window[:, :-1].contiguous()}, window[:, 1:].contiguous())

    def _long_enough(self, part: int) -> Tensor:
        folder = self.folder or standard_library()
        text = texts(folder, self.max_bytes)[part]
        if len(text) <= self.n:
            raise ValueError(
                f"text: the {('training', 'evaluation')[part]} files under {folder} hold {len(text)} bytes within "
                f"max_bytes={self.max_bytes}; windows of n={self.n} need {self.n + 1}: want a smaller n, more "
                "max_bytes, or a folder with more .py files"
            )
        return text


def standard_library() -> str:
    return sysconfig.get_path("stdlib")


def sources(folder: str) -> list[tuple[bytes, str]]:
    """(hash, path relative to folder) of every `.py` file that counts, in the order of the hash."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        names = [name for name in files if name.endswith(".py") and not name.startswith(_MADE_HERE)]
        paths = [(Path(place) / name).relative_to(folder).as_posix() for name in names]
        found += [(hashlib.sha256(path.encode(errors="surrogateescape")).digest(), path) for path in paths]
    return sorted(found)


def in_evaluation(digest: bytes) -> bool:
    """Read from the hash's far end: its near end is the order, in which the byte limit cuts."""
    return int.from_bytes(digest[-4:], "big") % _EVAL_IN == 0


@lru_cache(maxsize=4)
def texts(folder: str, max_bytes: int) -> tuple[Tensor, Tensor]:
    """The bytes to train on and those to evaluate on, uint8, files separated by a zero byte."""
    parts = (bytearray(), bytearray())
    left = max_bytes
    for digest, path in sources(folder):
        if left <= 0:
            break
        content = (Path(folder) / path).read_bytes()[:left]
        left -= len(content)
        parts[in_evaluation(digest)].extend(content + _BETWEEN_FILES)
    train, evaluation = (torch.from_numpy(np.frombuffer(part, np.uint8)) for part in parts)
    return train, evaluation
