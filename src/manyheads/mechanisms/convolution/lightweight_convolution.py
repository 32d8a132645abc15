"""Lightweight convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.taps import band_matrix, dense_at_taps, surround, tap_columns
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

MAPPINGS = ("contiguous", "interleaved")


@register
class LightweightConvolution(Mechanism):
    """A short depthwise convolution with one softmax-normalised kernel per head in place of attention.

        u = GLU(W_in x);  y_t,c = sum_k softmax(kernel_h(c))_k u_(t - left + k),c;  result W_out y

    left = kernel_size - 1 when causal, else kernel_size // 2. head_mapping: which channels share the kernel of head h.
    "contiguous": c // (dim / heads) = h; "interleaved": c mod heads = h. Both are in the released code, the first in
    its [time, batch, channel] version and in dynamic convolution, the second in the [batch, channel, time] version and
    the CUDA kernel: weights trained with one do not fit the other.
    Taps outside the sequence, on padding or forbidden by a dense mask add nothing; the others are not raised in their
    place. Matrix: a band, the same for all tokens. The state is the last kernel_size - 1 rows of u.

    Source: Wu et al., Pay Less Attention with Lightweight and Dynamic Convolutions, arXiv:1901.10430, and the released
    LightweightConv, without its drop-out of taps and its optional bias after the convolution. bias: of W_in, W_out.
    Weights: kernel[h] is weight[h, 0].
    """

    card = Card(
        name="lightweight-convolution",
        title="Pay Less Attention with Lightweight and Dynamic Convolutions",
        reference="arXiv:1901.10430",
        family=Family.CONVOLUTION,
        patterns={"noncausal-self", "causal-self"},
        time="n kernel_size",
        state="1",
        parallel="halo",
        example={"kernel_size": 4},
        notes="Sees kernel_size tokens per layer; depth widens the view. No lookup by content: 9% on quick recall, "
        "9% in five times the steps.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        kernel_size: int = 15,
        head_mapping: str = "contiguous",
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if kernel_size < 2:
            raise ValueError(
                f"{self.card.name}: kernel_size={kernel_size}; want at least 2, a softmax over one tap is 1"
            )
        if head_mapping not in MAPPINGS:
            raise ValueError(f"{self.card.name}: head_mapping={head_mapping!r}; want one of {list(MAPPINGS)}")
        self.kernel_size, self.head_mapping = kernel_size, head_mapping
        self.left = kernel_size - 1 if causal else kernel_size // 2
        self.in_proj = nn.Linear(dim, 2 * dim, bias=bias)
        # Of the released shape, on which its bound depends: sqrt(6 / (kernel_size + heads kernel_size)).
        self.kernel = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, 1, kernel_size)).squeeze(1))
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        n, seen = x.shape[1], call.seen
        u = F.glu(self.in_proj(x), -1)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if call.padding is None else call.padding
        if call.padding is not None:
            u = u.masked_fill(~real[..., None], 0.0)
        rows, real = surround(u, real, self.left, self.kernel_size - 1 - self.left, call.state, call.across)
        kernel = self.kernel.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        if call.dense is None and not call.need_weights:
            each = self._per_channel(kernel)[:, None]
            mixed = F.conv1d(rows.transpose(1, 2), each, groups=self.dim).transpose(1, 2)
            return Result(self.out_proj(mixed))
        taps = kernel * real.unfold(1, self.kernel_size, 1)[:, :, None]
        columns = tap_columns(n, seen, self.left, self.kernel_size, x.device)
        if call.dense is not None:
            taps = taps * dense_at_taps(call.dense, columns)
        each = self._per_channel(taps.transpose(1, 2))  # [b, e, n, K]
        mixed = (each * rows.unfold(1, self.kernel_size, 1).transpose(1, 2)).sum(-1).transpose(1, 2)
        return Result(self.out_proj(mixed), band_matrix(taps, columns, seen + n) if call.need_weights else None)

    def _per_channel(self, of_heads: Tensor) -> Tensor:
        """[h, K] or [b, h, n, K] -> the same for each channel, [e, K] or [b, e, n, K]."""
        axis = 0 if of_heads.ndim == 2 else 1
        if self.head_mapping == "contiguous":
            return of_heads.repeat_interleave(self.head_dim, axis)
        return torch.cat([of_heads] * self.head_dim, axis)
