"""What models that draw by captions share: their words, the time, norms, and layers that begin at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.near import suggest

START = "<start>"


class Captioned:
    """Captions to ids, by the words of the model's config."""

    config: Any
    device: Any

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Word ids [b, m] and their mask [b, m] (True = a word), rows filled up at the end; ValueError for a word that
        is not in the vocabulary, and for captions that are too long."""
        known = {word: number for number, word in enumerate(self.config.words)}
        rows = []
        for caption in [captions] if isinstance(captions, str) else captions:
            said = [self.config.words[0], *caption.lower().split()]
            strange = [word for word in said if word not in known]
            if strange:
                raise ValueError(
                    f"{caption!r}: the model does not know {strange[0]!r}{suggest(strange[0], list(known))}; "
                    f"its words are {' '.join(self.config.words[1:])}"
                )
            if len(said) > self.config.max_words:
                raise ValueError(f"{caption!r} has {len(said) - 1} words; want {self.config.max_words - 1} at most")
            rows.append([known[word] for word in said])
        longest = max(map(len, rows), default=1)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return ids, torch.arange(longest, device=self.device) < lengths[:, None]


def check_words(words: Sequence[str]) -> None:
    if len(set(words)) != len(words):
        raise ValueError("words: every word may stand once in the vocabulary")


def check_pictures(config: Any, pictures: Tensor) -> None:
    size = config.image_size
    wanted = (config.num_channels, size, size)
    if tuple(pictures.shape[1:]) != wanted:
        raise ValueError(f"pictures have shape {tuple(pictures.shape)}; want [batch, {', '.join(map(str, wanted))}]")


def sinusoids(time: Tensor, count: int) -> Tensor:
    """Times [b] in 0..1 -> [b, 2 count], cosines and sines of 1000 t at rates from 1 down to 1/10000."""
    rates = torch.exp(-math.log(10000) * torch.arange(count, device=time.device) / count)
    angles = 1000 * time.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def normed(x: Tensor) -> Tensor:
    """LayerNorm without gains of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def zero(*modules: Any) -> None:
    for module in modules:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
