"""Long-short context block, of LoCoNet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class LoCoNet(Mechanism):
    """Who speaks: speakers are compared over a few frames by a convolution, each speaker over all frames by attention.

        short: h = x + W_2 gelu(W_1 LN(conv(x))),  conv [speakers, frames] -> all speakers of the middle frame
        long:  s = LN(h + attention over the frames of the same speaker),  y = LN(s + V_2 relu(V_1 s))

    x: [b, height, width, dim], a row per speaker and a column per frame. The convolution has a kernel of speakers x
    frames and own outputs for each speaker: fewer rows than `speakers` are filled up with zeros, more are refused. The
    result is y, residuals and norms included. Weights [b, heads, cells, cells]: the attention, zero between speakers.

    Source: Wang et al., LoCoNet: Long-Short Context Network for Active Speaker Detection, arXiv:2301.08237, and its
    released layers, in their order, where 3 speakers are read (here 4 by default); the paper lists long before short.
    Without dropout.
    Weights: short_up, short_down are conv2d_1x1, conv2d_1x1_2 without their last two axes; self_attn.in_proj is q, k, v
    in this order.
    """

    card = Card(
        name="loconet",
        title="LoCoNet: Long-Short Context Network for Active Speaker Detection",
        reference="arXiv:2301.08237",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height width^2",
        state="",
        decodes=False,
        example={"speakers": 33, "frames": 3},
        notes="a row of the grid is a speaker; their order matters, the first is the one in question",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, speakers: int = 4, frames: int = 7, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        if speakers < 1 or frames < 1 or frames % 2 == 0:
            raise ValueError(
                f"loconet: speakers={speakers}, frames={frames}; want at least one speaker and an odd number of "
                "frames, as many before as after"
            )
        self.speakers = speakers
        self.conv = nn.Conv2d(dim, dim * speakers, (speakers, frames), padding=(0, frames // 2), bias=bias)
        self.attention = Heads(dim, heads, bias)
        self.short_up, self.short_down = nn.Linear(dim, 2 * dim, bias=bias), nn.Linear(2 * dim, dim, bias=bias)
        self.long_up, self.long_down = nn.Linear(dim, 4 * dim, bias=bias), nn.Linear(4 * dim, dim, bias=bias)
        self.norm_short, self.norm_long, self.norm_out = (nn.LayerNorm(dim) for _ in range(3))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        b, rows, columns, _ = x.shape
        if rows > self.speakers:
            raise ValueError(
                f"loconet: x has shape {tuple(x.shape)}, {rows} rows; want at most speakers={self.speakers}"
            )
        h = x + self.short_down(F.gelu(self.short_up(self.norm_short(self._short(x, call.padding)))))
        each = h.flatten(0, 1)
        real = None if call.padding is None else call.padding.flatten(0, 1)
        mixed, weights = self.attention(each, *self.attention.read(each), key_mask(real), call.need_weights)
        s = self.norm_long(each + mixed)
        output = self.norm_out(s + self.long_down(F.relu(self.long_up(s)))).unflatten(0, (b, rows))
        if weights is not None:
            same = torch.eye(rows, dtype=weights.dtype, device=x.device)
            weights = torch.einsum("brhij,rs->bhrisj", weights.unflatten(0, (b, rows)), same)
            weights = weights.reshape(b, self.heads, rows * columns, rows * columns)
        return Result(output, weights)

    def _short(self, x: Tensor, real: Tensor | None) -> Tensor:
        """The convolution over all speakers, [b, rows, columns, e] -> the same shape."""
        rows = x.shape[1]
        if real is not None:
            x = x.masked_fill(~real[..., None], 0.0)
        filled = F.pad(x, (0, 0, 0, 0, 0, self.speakers - rows))
        together = self.conv(filled.permute(0, 3, 1, 2)).squeeze(2)  # [b, e speakers, columns]
        return together.unflatten(1, (self.dim, self.speakers)).permute(0, 2, 3, 1)[:, :rows]
