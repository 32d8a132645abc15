"""A UNet that draws by the words of a caption: convolutions down and up, self and cross attention at several sizes.

Shapes: b batch, c channels, s side of a map, m words, e width of a level.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from manyheads.models.captioned import START, Captioned, check_pictures, check_words, normed, sinusoids, zero
from manyheads.models.diffusion import VelocityOutput
from manyheads.models.flow import Flow
from manyheads.registry import mechanism_class


class UNetConfig(PreTrainedConfig):
    """Sizes, and the words that captions are made of.

    widths: of each level, the first at image_size pixels, each next at half of that. attention_sides: at which of those
    sides a level attends. words, attention, cross_attention, frequencies: as of `DiffusionConfig`.
    """

    model_type = "manyheads_unet"

    image_size: int = 16
    num_channels: int = 1
    widths: Any = (32, 64, 64)
    attention_sides: Any = (8, 4)
    num_attention_heads: int = 4
    frequencies: int = 64
    max_words: int = 8
    words: Any = None
    attention: str = "softmax"
    cross_attention: str = "softmax"

    def __init__(self, **kwargs: Any) -> None:
        kwargs["words"] = list(kwargs.get("words") or [START])
        super().__init__(**kwargs)
        self.widths, self.attention_sides = list(self.widths), list(self.attention_sides)
        check_words(self.words)
        if not self.widths or self.image_size % 2 ** (len(self.widths) - 1):
            raise ValueError(f"image_size={self.image_size} cannot be halved for each of widths={self.widths}")
        if not self.attention_sides or not set(self.attention_sides) <= set(self.sides):
            raise ValueError(f"attention_sides={self.attention_sides}: want some of the levels' sides {self.sides}")
        if any(width % (4 * self.num_attention_heads) for width in self.widths):
            raise ValueError(f"widths={self.widths} are no multiples of 4 x {self.num_attention_heads} heads")

    @property
    def sides(self) -> list[int]:
        """Of the levels' maps."""
        return [self.image_size // 2**level for level in range(len(self.widths))]


class Residual(nn.Module):
    """skip(x) + second(SiLU(s GN(first(SiLU(GN(x)))) + b)), scale and shift linear in the time; two 3 x 3 convolutions,
    the second begins at zero. What `second` gives is the residual branch before it is added: a place for features."""

    def __init__(self, wide: int, width: int, time: int):
        super().__init__()
        self.norm, self.first = nn.GroupNorm(4, wide), nn.Conv2d(wide, width, 3, padding=1)
        self.time = nn.Linear(time, 2 * width)
        self.norm_again, self.second = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if wide == width else nn.Conv2d(wide, width, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.time(F.silu(time))[:, :, None, None].chunk(2, 1)
        hidden = self.norm_again(self.first(F.silu(self.norm(x)))) * (1 + scale) + shift
        found: Tensor = self.skip(x) + self.second(F.silu(hidden))
        return found


class Attending(nn.Module):
    """x + p; x + SelfAttention(LN(x)); x + CrossAttention(LN(x), words); x + MLP(LN(x)), over the map's places row by
    row, p a learnt vector of each place; the last three begin at zero. The words come in through a linear map of the
    block's own."""

    def __init__(self, width: int, side: int, words: int, config: UNetConfig):
        super().__init__()
        heads = config.num_attention_heads
        self.places = nn.Parameter(torch.zeros(side * side, width))
        self.self_attention = mechanism_class(config.attention)(width, heads)
        self.words = nn.Linear(words, width)
        self.cross_attention = mechanism_class(config.cross_attention)(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, grid: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """grid [b, e, s, s], words [b, m, e'], mask [b, m] (True = a word)."""
        x = grid.flatten(2).transpose(1, 2) + self.places
        x = x + self.self_attention(normed(x)).output
        x = x + self.cross_attention(normed(x), self.words(words), mask=mask).output
        x = x + self.down(F.gelu(self.up(normed(x)), approximate="tanh"))
        return x.transpose(1, 2).unflatten(2, grid.shape[2:])


class Level(nn.Module):
    """A residual block, and attention where the level has it."""

    def __init__(self, wide: int, width: int, side: int, config: UNetConfig):
        super().__init__()
        words = config.widths[-1]
        self.residual = Residual(wide, width, words)
        self.attention = Attending(width, side, words, config) if side in config.attention_sides else None

    def forward(self, x: Tensor, words: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        x = self.residual(x, time)
        return x if self.attention is None else self.attention(x, words, mask)


class DiffusionUNet(Captioned, Flow, PreTrainedModel):
    """Claim: a UNet with self and cross attention on its small maps learns to draw what captions say.

    Levels halve the picture by a convolution of stride two; the way up doubles by repetition and reads the map of the
    same side from the way down beside its own. Attention is of the registry's mechanisms: `down.1`, `down.2`, `middle`,
    `up.0`, `up.1` by default, at sides 8, 4, 4, 4 and 8; layers are counted in that order. Predicts the velocity of a
    rectified flow, and takes and gives what `DiffusionTransformer` does.
    Sources: the UNet of latent diffusion (arXiv 2112.10752), scales and shifts by the time (2105.05233), rectified flow
    (2209.03003) with classifier-free guidance (2207.12598). Different: one residual block a level, pixels where there
    it is latents, learnt places where it attends, and no text encoder: what a word's column shows is that word's.
    """

    config_class = UNetConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("Level",)

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, sides, e = config.widths, config.sides, config.widths[-1]
        self.time_in, self.time_out = nn.Linear(2 * config.frequencies, e), nn.Linear(e, e)
        self.words = nn.Embedding(len(config.words), e)
        self.word_places = nn.Parameter(torch.zeros(config.max_words, e))
        self.inward = nn.Conv2d(config.num_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Level(width, width, side, config) for width, side in zip(widths, sides, strict=True))
        self.halve = nn.ModuleList(nn.Conv2d(wide, width, 3, stride=2, padding=1) for wide, width in pairwise(widths))
        self.middle = Level(e, e, sides[-1], config)
        below = [*widths[1:], e]
        self.up = nn.ModuleList(
            Level(below[i] + widths[i], widths[i], sides[i], config) for i in reversed(range(len(widths)))
        )
        self.norm, self.velocity = nn.GroupNorm(4, widths[0]), nn.Conv2d(widths[0], config.num_channels, 3, padding=1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, Residual):
            zero(module.second)
        elif isinstance(module, Attending):
            nn.init.normal_(module.places, std=0.5)
            zero(module.self_attention.o_proj, module.cross_attention.o_proj, module.down)
        elif isinstance(module, DiffusionUNet):
            nn.init.normal_(module.word_places, std=0.5)
            zero(module.velocity)

    def get_input_embeddings(self) -> nn.Module:
        return self.inward

    def forward(
        self,
        pixel_values: Tensor,
        time: Tensor,
        caption_ids: Tensor,
        caption_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> VelocityOutput:
        """pixel_values [b, c, height, width] at times [b] in 0..1; caption_ids [b, m] and their mask, as `encode`
        gives them. labels: the velocity to reach, [b, c, height, width]."""
        check_pictures(self.config, pixel_values)
        if caption_mask is None:
            caption_mask = torch.ones_like(caption_ids, dtype=torch.bool)
        words = self.words(caption_ids) + self.word_places[: caption_ids.shape[1]]
        told = self.time_out(F.silu(self.time_in(sinusoids(time, self.config.frequencies).to(self.dtype))))
        x, kept = self.inward(pixel_values), []
        for number, level in enumerate(self.down):
            x = level(self.halve[number - 1](x) if number else x, words, caption_mask, told)
            kept.append(x)
        x = self.middle(x, words, caption_mask, told)
        for number, level in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2.0) if number else x
            x = level(torch.cat([x, kept[-1 - number]], 1), words, caption_mask, told)
        velocity = self.velocity(F.silu(self.norm(x)))
        loss = None if labels is None else F.mse_loss(velocity, labels)
        return VelocityOutput(loss=loss, velocity=velocity)


AutoConfig.register("manyheads_unet", UNetConfig, exist_ok=True)
AutoModel.register(UNetConfig, DiffusionUNet, exist_ok=True)
