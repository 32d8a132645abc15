"""A diffusion transformer: pictures from noise, by the words of a caption.

Shapes: b batch, c channels, n patches, m words, e hidden size, p patch side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from manyheads.models.captioned import START, Captioned, check_pictures, check_words, normed, sinusoids, zero
from manyheads.models.flow import Flow
from manyheads.registry import mechanism_class


class DiffusionConfig(PreTrainedConfig):
    """Sizes, and the words that captions are made of.

    words: the vocabulary; its first is put before every caption and is all that an empty caption holds, so that a
    caption without words has a key to look at. attention, cross_attention: names of mechanisms. frequencies: of the
    time's sinusoids.
    """

    model_type = "manyheads_diffusion"

    image_size: int = 16
    num_channels: int = 1
    patch_size: int = 2
    hidden_size: int = 128
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    intermediate_size: int = 512
    frequencies: int = 64
    max_words: int = 8
    words: Any = None
    attention: str = "softmax"
    cross_attention: str = "softmax"

    def __init__(self, **kwargs: Any) -> None:
        kwargs["words"] = list(kwargs.get("words") or [START])
        super().__init__(**kwargs)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")
        check_words(self.words)

    @property
    def side(self) -> int:
        """Patches in a row of the picture."""
        return self.image_size // self.patch_size


@dataclass
class VelocityOutput(ModelOutput):
    """loss: the mean squared error of the velocity, where one to reach was given. velocity: [b, c, height, width]."""

    loss: Tensor | None = None
    velocity: Tensor | None = None


class DiffusionBlock(nn.Module):
    """x + g1 SelfAttention(s1 LN(x) + b1); x + CrossAttention(LN(x), words); x + g2 MLP(s2 LN(x) + b2), where shifts,
    scales and gates are linear in the time and begin at zero, as the cross attention's output does."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        e, heads = config.hidden_size, config.num_attention_heads
        self.modulation = nn.Linear(e, 6 * e)
        self.self_attention = mechanism_class(config.attention)(e, heads)
        self.cross_attention = mechanism_class(config.cross_attention)(e, heads)
        self.up, self.down = nn.Linear(e, config.intermediate_size), nn.Linear(config.intermediate_size, e)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        """x [b, n, e], words [b, m, e], mask [b, m] (True = a word), time [b, e]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, -1)
        x = x + gate1 * self.self_attention(normed(x) * (1 + scale1) + shift1).output
        x = x + self.cross_attention(normed(x), words, mask=mask).output
        hidden = F.gelu(self.up(normed(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.down(hidden)


class DiffusionTransformer(Captioned, Flow, PreTrainedModel):
    """Claim: a transformer over patches, told the time by adaptive norms, learns to draw what captions say.

    Predicts the velocity of a rectified flow: x_t = (1 - t) x + t noise, v = noise - x, t from 0 (picture) to 1; see
    `sample`. Attention layers are mechanisms of the registry, self attention over the patches and cross attention to
    the caption's words, so that taps see both. Words are embeddings with a learnt place, with no text encoder before
    the cross attention: what a word's column shows is that word's.
    Sources: DiT's adaLN-zero (arXiv 2212.09748), cross attention beside it as in PixArt-alpha (2310.00426), rectified
    flow (2209.03003) with classifier-free guidance (2207.12598). Different from DiT: the time's sinusoids are of
    1000 t, and there are no class labels.
    """

    config_class = DiffusionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("DiffusionBlock",)

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        e, wide = config.hidden_size, config.num_channels * config.patch_size**2
        self.patches = nn.Linear(wide, e)
        self.places = nn.Parameter(torch.zeros(config.side**2, e))
        self.time_in, self.time_out = nn.Linear(2 * config.frequencies, e), nn.Linear(e, e)
        self.words = nn.Embedding(len(config.words), e)
        self.word_places = nn.Parameter(torch.zeros(config.max_words, e))
        self.layers = nn.ModuleList(DiffusionBlock(config) for _ in range(config.num_hidden_layers))
        self.modulation = nn.Linear(e, 2 * e)
        self.velocity = nn.Linear(e, wide)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, DiffusionBlock):
            zero(module.modulation, module.cross_attention.o_proj)
        elif isinstance(module, DiffusionTransformer):
            nn.init.normal_(module.places, std=0.5)
            nn.init.normal_(module.word_places, std=0.5)
            zero(module.modulation, module.velocity)

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

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
        x = self.patches(self.cut(pixel_values)) + self.places
        if caption_mask is None:
            caption_mask = torch.ones_like(caption_ids, dtype=torch.bool)
        words = self.words(caption_ids) + self.word_places[: caption_ids.shape[1]]
        told = self.time_out(F.silu(self.time_in(sinusoids(time, self.config.frequencies).to(self.dtype))))
        for layer in self.layers:
            x = layer(x, words, caption_mask, told)
        shift, scale = self.modulation(F.silu(told))[:, None].chunk(2, -1)
        velocity = self.joined(self.velocity(normed(x) * (1 + scale) + shift))
        loss = None if labels is None else F.mse_loss(velocity, labels)
        return VelocityOutput(loss=loss, velocity=velocity)

    def cut(self, pictures: Tensor) -> Tensor:
        """[b, c, height, width] -> patches [b, n, c * p * p], row by row."""
        side = self.config.patch_size
        check_pictures(self.config, pictures)
        return F.unfold(pictures, side, stride=side).transpose(1, 2)

    def joined(self, patches: Tensor) -> Tensor:
        """The inverse of `cut`."""
        side = self.config.patch_size
        return F.fold(patches.transpose(1, 2), self.config.image_size, side, stride=side)


AutoConfig.register("manyheads_diffusion", DiffusionConfig, exist_ok=True)
AutoModel.register(DiffusionConfig, DiffusionTransformer, exist_ok=True)
