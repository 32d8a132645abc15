"""Sampling from a rectified flow in steps that are told to whoever reads or changes the model meanwhile.

Shapes: b captions, r rows of the batch that the model sees (twice b where it is guided), c channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Where sampling stands. index: from 0 of count. time, after: of this step and of the next, 1 is noise. captions:
    how many; ids, mask: theirs, [b, m]. unconditional, conditional: the rows of the batch that read no caption, and
    those that do (the former empty where the sample is not guided)."""

    index: int
    count: int
    time: float
    after: float
    ids: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    guided: bool

    @property
    def captions(self) -> int:
        return len(self.ids)

    @property
    def unconditional(self) -> slice:
        return slice(0, self.captions if self.guided else 0)

    @property
    def conditional(self) -> slice:
        return slice(self.captions if self.guided else 0, (2 if self.guided else 1) * self.captions)


# What the pictures are at the beginning of a step -> what they are to be instead; [b, c, height, width].
Move = Callable[[Tensor, Step], Tensor]
# The velocity of a step, that of the captions without guidance, and the pictures -> the velocity to take.
Correct = Callable[[Tensor, Tensor, Tensor, Step], Tensor]
STEPS, GUIDANCE = 20, 2.0


def whole_captions(captions: str | Sequence[str]) -> list[str]:
    """One caption by itself is a list of one, not its letters."""
    return [captions] if isinstance(captions, str) else list(captions)


class Flow:
    """What a model that predicts velocities gets: `sample`, `invert`, and the step that is told while they run."""

    step: Step | None = None
    config: Any
    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]]

    def moves(self) -> list[Move]:
        """Changes to the pictures before each step, in order; a context manager adds its own and takes it away."""
        found: list[Move] = self.__dict__.setdefault("_moves", [])
        return found

    def corrections(self) -> list[Correct]:
        """Changes to the velocity of each step, likewise."""
        found: list[Correct] = self.__dict__.setdefault("_corrections", [])
        return found

    @torch.no_grad()
    def sample(
        self,
        captions: str | Sequence[str],
        *,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        seed: int = 0,
        noise: Tensor | None = None,
        held: Tensor | None = None,
        watch: Move | None = None,
    ) -> Tensor:
        """Pictures of the captions, [b, c, height, width] from -1 to 1 and a little beyond.

        Euler: x <- x - (t - t') v from t = 1 to 0 in equal steps, v = v_0 + guidance (v_caption - v_0), v_0 of the
        empty caption; guidance 1 is the caption's alone, and costs half. seed: draws the noise, unless it is given.
        held: [steps + 1, k, c, height, width], what the LAST k pictures are at each step, of pictures that are there
        already (`noised`, `invert`). watch(pictures, step) sees each step's beginning and gives what to go on with.
        While it runs `model.step` tells where it stands.
        """
        if steps < 1:
            raise ValueError(f"steps must be 1 at least; got {steps}")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number; got {guidance}")
        given = whole_captions(captions)
        x = self.noise(len(given), seed) if noise is None else noise.to(self.device, self.dtype)  # type: ignore[attr-defined]
        if len(x) != len(given) or not given:
            raise ValueError(f"{len(given)} captions and noise for {len(x)} pictures: want as many, one at least")
        if held is not None and (len(held) != steps + 1 or held.shape[1] > len(given)):
            raise ValueError(f"held is {tuple(held.shape)}; want [{steps + 1}, at most {len(given)}, ...]")
        guided = guidance != 1
        ids, mask = self.encode([""] * len(given) + given if guided else given)
        for index in range(steps):
            times = 1 - index / steps, 1 - (index + 1) / steps
            place = Step(index, steps, *times, ids[-len(given) :], mask[-len(given) :], guided)
            with self.told(place):
                x = _kept(x, held, index)
                for move in [*self.moves(), *([watch] if watch else [])]:
                    x = move(x, place)
                v = alone = self.velocities(torch.cat([x, x]) if guided else x, place.time, ids, mask)
                if guided:
                    plain, alone = v.chunk(2)
                    v = plain + guidance * (alone - plain)
                for correct in self.corrections():
                    v = correct(v, alone, x, place)
            x = x - (place.time - place.after) * v
        return _kept(x, held, steps)

    def velocities(self, x: Tensor, time: float, ids: Tensor, mask: Tensor) -> Tensor:
        whole: Any = self
        found: Tensor = whole(x, torch.full((len(x),), time, device=x.device), ids, mask).velocity
        return found

    def noise(self, count: int, seed: int) -> Tensor:
        """Of count pictures; the first of them are the same for any count."""
        shape = (self.config.num_channels, self.config.image_size, self.config.image_size)
        drawn = torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device, self.dtype)  # type: ignore[attr-defined]

    @torch.no_grad()
    def invert(self, pictures: Tensor, captions: str | Sequence[str], *, steps: int = STEPS) -> Tensor:
        """The way back from pictures to their noise by the same flow unguided, [steps + 1, b, c, height, width] in the
        order in which sampling meets them: the first is the noise, the last the pictures."""
        captions = whole_captions(captions)
        if len(captions) != len(pictures):
            raise ValueError(f"{len(captions)} captions of {len(pictures)} pictures: want one for each")
        ids, mask = self.encode(captions)
        path = [pictures]
        for index in reversed(range(steps)):
            before = 1 - index / steps
            v = self.velocities(path[-1], 1 - (index + 1) / steps, ids, mask)
            path.append(path[-1] + (before - (1 - (index + 1) / steps)) * v)
        return torch.stack(path[::-1])

    def noised(self, pictures: Tensor, *, steps: int = STEPS, seed: int = 0) -> Tensor:
        """The straight way from noise to the pictures, (1 - t) x + t noise: [steps + 1, b, c, height, width]."""
        noise = self.noise(len(pictures), seed)
        times = torch.linspace(1, 0, steps + 1, device=pictures.device).reshape(-1, 1, 1, 1, 1)
        return (1 - times) * pictures + times * noise

    @contextmanager
    def told(self, place: Step) -> Iterator[None]:
        before, self.step = self.step, place
        try:
            yield
        finally:
            self.step = before


def _kept(x: Tensor, held: Tensor | None, index: int) -> Tensor:
    if held is None or not held.shape[1]:
        return x
    return torch.cat([x[: len(x) - held.shape[1]], held[index].to(x)])
