"""The ends of a second modality beside a frozen text model: pictures into embeddings, states into noise, and the loss.

    x_t = a(t) x + (1 - a(t)^2)^1/2 e,  a(t) = cos(pi t / 2),  e ~ N(0, 1),  t from 0 (the picture) to 1 (noise)
    loss = cross-entropy of text tokens + weight * mean |e - e'|^2,  e' read from the states of the picture's tokens

Source: Shi et al., LlamaFusion, arXiv:2412.15188, which keeps Transfusion's objective (arXiv:2408.11039): its schedule
and its weight of 5. Their pictures are latents of a VAE and go through blocks of a U-Net on both ends; these ends are
linear, as Transfusion's smaller ones are, and take what they are given. No code of the authors was found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.convert.adapter import read_adapter, write_adapter
from manyheads.convert.fused import Fused

KIND = "llamafusion ends"
WEIGHT = 5.0
# Features of a time: cosines and sines of it, times 1 to 1,000.
_TIMES = 32


class ImageEnds(nn.Module):
    """Pictures [k, c, height, width] in patches of `patch` x `patch`: a token each, in reading order.

    width: of the text model's states. Its weights are new and are trained with the new modality's.
    """

    def __init__(self, width: int, *, channels: int = 1, patch: int = 2) -> None:
        super().__init__()
        if min(width, channels, patch) < 1:
            raise ValueError(f"width={width}, channels={channels} and patch={patch}: want 1 or more of each")
        self.width, self.channels, self.patch = width, channels, patch
        self.embedding = nn.Linear(channels * patch * patch, width)
        self.time = nn.Linear(2 * _TIMES, width)
        self.reading = nn.Linear(width, channels * patch * patch)

    def tokens(self, pictures: Tensor) -> int:
        """Of one picture; ValueError where they do not fit into patches."""
        if pictures.ndim != 4 or pictures.shape[1] != self.channels or any(s % self.patch for s in pictures.shape[2:]):
            raise ValueError(
                f"pictures are {list(pictures.shape)}; want [k, {self.channels}, height, width] in multiples of "
                f"{self.patch}"
            )
        return int(pictures.shape[2] // self.patch * (pictures.shape[3] // self.patch))

    def embed(self, noised: Tensor, times: Tensor) -> Tensor:
        """Pictures at their times [k] -> embeddings [k tokens, width]."""
        self.tokens(noised)
        patches = F.unfold(noised, self.patch, stride=self.patch).transpose(1, 2)
        rates = torch.logspace(0, 3, _TIMES, dtype=torch.float64, device=times.device)
        turned = times.double()[:, None] * rates
        at = self.time(torch.cat((turned.cos(), turned.sin()), 1).to(self.time.weight))
        out: Tensor = (self.embedding(patches) + at[:, None]).flatten(0, 1)
        return out

    def noise(self, states: Tensor, like: Tensor) -> Tensor:
        """States of the pictures' tokens [k tokens, width] -> the noise that is thought to be in pictures `like`."""
        patches = self.reading(states).unflatten(0, (len(like), self.tokens(like))).transpose(1, 2)
        out: Tensor = F.fold(patches, like.shape[2:], self.patch, stride=self.patch)
        return out

    def save(self, path: str | Path) -> Path:
        """In one safetensors file, beside that of the modality."""
        sizes = {"width": self.width, "channels": self.channels, "patch": self.patch}
        return write_adapter(path, KIND, dict(self.named_parameters()), sizes, {})


def load_ends(path: str | Path) -> ImageEnds:
    weights, sizes = read_adapter(path, KIND, {})
    made = ImageEnds(sizes["width"], channels=sizes["channels"], patch=sizes["patch"])
    made.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return made


class FusionLoss(NamedTuple):
    """whole = text + weight * pictures."""

    whole: Tensor
    text: Tensor
    pictures: Tensor


def noised(pictures: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    kept, mixed = (share[:, None, None, None].to(pictures) for share in _shares(times))
    return kept * pictures + mixed * noise


def _shares(times: Tensor) -> tuple[Tensor, Tensor]:
    angle = times.double() * (math.pi / 2)
    return angle.cos(), angle.sin()


def drawn_times(kinds: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """A time for every picture of `kinds` [b, n], in reading order: from 0 to 1; to a half for one before the text of
    its row, its caption, which could not be read off noise. mask [b, n]: 1 for what is no padding."""
    runs, _ = _pictures(kinds)
    text = kinds == 0 if mask is None else (kinds == 0) & mask.bool()
    behind = text.flip(1).cumsum(1).flip(1) > 0
    most = [0.5 if bool(behind[row, stop - 1]) else 1.0 for row, _, stop in runs]
    return torch.rand(len(runs), generator=generator, dtype=torch.float64) * torch.tensor(most, dtype=torch.float64)


def fusion_loss(
    fused: Fused,
    ends: ImageEnds,
    ids: Tensor,
    *,
    kinds: Tensor,
    pictures: Tensor,
    times: Tensor | None = None,
    noise: Tensor | None = None,
    weight: float = WEIGHT,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> FusionLoss:
    """The loss of text and pictures on rows ids [b, n]. pictures [k, c, h, w]: those of `kinds` in reading order.
    times [k], noise: drawn where they are not given, `drawn_times`. labels: as the text model has them, ids without."""
    runs, sizes = _pictures(kinds)
    each = ends.tokens(pictures)
    if len(runs) != len(pictures) or any(size != each for size in sizes):
        raise ValueError(
            f"kinds have {len(runs)} pictures of {sorted(set(sizes))} tokens; given are {len(pictures)} of {each}"
        )
    times = drawn_times(kinds, attention_mask) if times is None else times
    if times.shape != (len(runs),) or bool(((times < 0) | (times > 1)).any()):
        raise ValueError(f"times are {list(times.shape)}; want {[len(runs)]}, each from 0 to 1")
    noise = torch.randn_like(pictures) if noise is None else noise
    given = ends.embed(noised(pictures, noise, times), times.to(pictures.device))
    labels = _labels(ids, attention_mask) if labels is None else labels
    options = {} if attention_mask is None else {"attention_mask": attention_mask}
    out = fused(ids, kinds=kinds, embeddings=given, labels=labels, use_cache=False, **options)
    apart = (noise - ends.noise(out.states, pictures)).square().mean()
    # Where no token is text the loss of text is a mean of none.
    text = out.loss if bool((labels[:, 1:] != -100).logical_and(kinds[:, 1:] == 0).any()) else apart.new_zeros(())
    return FusionLoss(text + weight * apart, text, apart)


def _labels(ids: Tensor, mask: Tensor | None) -> Tensor:
    return ids if mask is None else ids.masked_fill(~mask.bool(), -100)


@torch.no_grad()
def draw_pictures(
    fused: Fused,
    ends: ImageEnds,
    ids: Tensor,
    shape: tuple[int, int],
    *,
    steps: int = 50,
    noise: Tensor | None = None,
) -> Tensor:
    """Pictures [b, c, *shape] behind rows of text ids [b, n] without padding, from noise, without new noise on the way
    (DDIM, arXiv:2010.02502):

        x' = a(t') x_0 + (1 - a(t')^2)^1/2 e',  x_0 = (x - (1 - a(t)^2)^1/2 e') / a(t)

    t: the middles of `steps` even parts of time, and 0; at 1 nothing is left of a picture, and a is none to divide by.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: want 1 or more")
    weight = ends.embedding.weight
    x = torch.randn(len(ids), ends.channels, *shape) if noise is None else noise
    x = x.to(weight)
    count = ends.tokens(x)
    whole = F.pad(ids, (0, count))
    kinds = F.pad(torch.zeros_like(ids), (0, count), value=1)
    times = F.pad((torch.arange(steps - 1, -1, -1, dtype=torch.float64) + 0.5) / steps, (0, 1))
    for now, after in itertools.pairwise(times):
        at = now.expand(len(ids)).to(weight.device)
        states = fused(whole, kinds=kinds, embeddings=ends.embed(x, at), use_cache=False, logits_to_keep=1).states
        thought = ends.noise(states, x)
        (kept, mixed), (then, more) = _shares(now), _shares(after)
        x = then.to(x) * (x - mixed.to(x) * thought) / kept.to(x) + more.to(x) * thought
    return x


def _pictures(kinds: Tensor) -> tuple[list[tuple[int, int, int]], list[int]]:
    """(row, start, stop) of every run of one number that is not zero, in reading order, and the tokens of each."""
    found = []
    for row, line in enumerate(kinds.long().tolist()):
        start = 0
        for at in range(1, len(line) + 1):
            if at == len(line) or line[at] != line[start]:
                if line[start]:
                    found.append((row, start, at))
                start = at
    return found, [stop - start for _, start, stop in found]


def trained(fused: Fused, ends: ImageEnds) -> list[nn.Parameter]:
    """All that an optimizer is given: the new modality's weights and the ends'."""
    own: Mapping[str, Any] = fused.own_weights()
    return [*own.values(), *ends.parameters()]
