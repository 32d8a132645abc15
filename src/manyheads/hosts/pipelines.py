"""Pipelines of diffusers as models that draw: interventions of `manyheads.steer.diffusion` take what `drawing` gives.

model = drawing(pipe)
with isolate(model, masks):
    images = model.sample(["a cat and a dog"], steps=30, guidance=7.5)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.models.flow import Step, whole_captions

# The denoisers whose calls are known: class -> the names of the pictures and of the words in its forward.
KNOWN = {
    "UNet2DConditionModel": ("sample", "encoder_hidden_states"),
    "PixArtTransformer2DModel": ("hidden_states", "encoder_hidden_states"),
}
# What a sample says itself, and what would make pictures that masks were not drawn for.
TAKEN = ("prompt", "num_inference_steps", "guidance_scale", "generator", "height", "width", "num_images_per_prompt")


@dataclass(frozen=True)
class Canvas:
    """image_size: pixels of a side, in which boxes and masks are told."""

    image_size: int
    model_type: str


def drawing(pipe: Any) -> PipelineHost:
    """The pipeline as a model that draws: `sample` runs it and tells each step, taps see its attention layers, and
    interventions that edit attention act on it. pipe: a text-to-image pipeline of diffusers with a UNet2DConditionModel
    or a PixArtTransformer2DModel; ValueError for another. The pipeline itself is not changed."""
    return PipelineHost(pipe)


class PipelineHost(nn.Module):
    """See `drawing`. Captions are rows 0 to b - 1 of a batch, and b to 2 b - 1 beside as many without, in guided
    passes, as diffusers lays them out. Steps are those of the pipeline's scheduler, found by the time that the denoiser
    is given; time is its share of the training's, 1 at most noise."""

    pipe: Any
    denoiser: Any

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        denoiser: Any = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        name = type(denoiser).__name__
        if name not in KNOWN:
            raise ValueError(
                f"{type(pipe).__name__} denoises by {name}; want a pipeline with one of {', '.join(KNOWN)}, which have "
                "self attention over the picture and cross attention to the words"
            )
        self.__dict__["pipe"], self.denoiser = pipe, denoiser
        side = denoiser.config.sample_size
        if not isinstance(side, int):
            raise ValueError(f"{name} draws {side}; want square pictures")
        self.config = Canvas(side * int(pipe.vae_scale_factor), f"diffusers {name}")
        self._told: Step | None = None
        self._heard = 0

    # -- what interventions ask ------------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        """Where the sample stands. ValueError outside of `sample`: which rows of a batch read captions is then not
        known."""
        if self._told is None:
            raise ValueError("no step is told: run the pipeline by sample() of what drawing(pipe) gave, not by itself")
        return self._told

    def moves(self) -> list[Any]:
        raise ValueError(
            "layout_guidance moves the latent by a gradient, which runs on models of this package and not on a pipeline"
        )

    def corrections(self) -> list[Any]:
        raise ValueError(
            "perturbed_guidance corrects velocities, which pipelines keep to themselves: it runs on models of this "
            "package; diffusers has pipelines of its own for it (PAG)"
        )

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.denoiser.parameters()).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = next(self.denoiser.parameters()).dtype
        return found

    @torch.no_grad()
    def encode(self, captions: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the denoiser reads of captions, [b, m, e], and its mask [b, m] (True = a word, and padding where the
        pipeline lets it be read)."""
        found = self.pipe.encode_prompt(
            whole_captions(captions), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        mask = found[1] if self._masked else None
        words = found[0].to(self.dtype)
        return words, torch.ones(words.shape[:2], device=words.device).bool() if mask is None else mask.bool()

    def noise(self, count: int, seed: int) -> Tensor:
        """[count, c, side, side] of the denoiser's latents."""
        config = self.denoiser.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def forward(self, latents: Tensor, time: Tensor, words: Tensor, mask: Tensor) -> Any:
        """One pass of the denoiser at times [b] from 0 to 1, as `heard_words` and taps make it."""
        last = self.pipe.scheduler.config.num_train_timesteps - 1
        options: dict[str, Any] = {"timestep": time * last, "encoder_hidden_states": words, "return_dict": False}
        if self._masked:
            extra = {"resolution": None, "aspect_ratio": None}
            options |= {"encoder_attention_mask": mask.to(self.dtype), "added_cond_kwargs": extra}
        return self.denoiser(latents, **options)[0]

    def velocities(self, latents: Tensor, time: float, words: Tensor, mask: Tensor) -> Tensor:
        """What the denoiser predicts (by its scheduler's terms) of latents that all stand at one time."""
        found: Tensor = self(latents, torch.full((len(latents),), time, device=latents.device), words, mask)
        return found

    @property
    def _masked(self) -> bool:
        """Whether the denoiser is told which words are padding."""
        return type(self.denoiser).__name__ == "PixArtTransformer2DModel"

    # -- sampling --------------------------------------------------------------------------------------------------

    def sample(
        self, captions: str | Sequence[str], *, steps: int = 50, guidance: float = 7.5, seed: int = 0, **options: Any
    ) -> Any:
        """What pipe(prompt=captions, num_inference_steps=steps, guidance_scale=guidance, generator=..., **options)
        gives, its steps told. guidance at most 1: one pass a step, without captions' absence. options: the pipeline's
        own, such as output_type or negative_prompt; those that would change the size or count of pictures are
        refused."""
        given = whole_captions(captions)
        taken = sorted(set(options) & set(TAKEN))
        if taken or not given:
            raise ValueError(f"sample: {taken or 'no captions'}: want captions, steps=, guidance=, seed= and options "
                             "that leave the size and the number of pictures as they are")  # fmt: skip
        with self._listening(len(given)):
            found = self.pipe(
                prompt=given,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
                **options,
            )
            if not self._heard:
                raise ValueError(f"{type(self.pipe).__name__} ran without its denoiser: no step was told")
        return found

    @contextmanager
    def _listening(self, captions: int) -> Iterator[None]:
        """While open, every pass of the denoiser tells its step."""
        own = weakref.ref(self)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            host = own()
            assert host is not None
            host._told = host._step(captions, args, kwargs)
            host._heard += 1

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            host = own()
            assert host is not None
            host._told = None

        self._heard = 0
        handles = [
            self.denoiser.register_forward_pre_hook(before, with_kwargs=True),
            self.denoiser.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            self._told = None
            for handle in handles:
                handle.remove()

    def _step(self, captions: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        pictures, words = KNOWN[type(self.denoiser).__name__]
        named = {**dict(zip((pictures, "timestep", words), args, strict=False)), **kwargs}
        rows, ids = len(named[pictures]), named[words]
        if rows not in (captions, 2 * captions):
            raise ValueError(f"a pass of {rows} rows for {captions} captions: which are whose is not known")
        times = self.pipe.scheduler.timesteps
        now = torch.as_tensor(named["timestep"]).flatten()[0].to(times)
        here = (times == now).nonzero()
        if not len(here):
            raise ValueError(f"time {float(now)} is none of the scheduler's {len(times)}")
        index, last = int(here[0]), self.pipe.scheduler.config.num_train_timesteps
        after = float(times[index + 1]) if index + 1 < len(times) else 0.0
        mask = torch.ones(captions, ids.shape[1], dtype=torch.bool, device=ids.device)
        return Step(index, len(times), float(now) / last, after / last, ids[-captions:], mask, rows == 2 * captions)
