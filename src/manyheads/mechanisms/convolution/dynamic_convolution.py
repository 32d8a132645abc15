"""Dynamic convolution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.taps import band_matrix, dense_at_taps, surround, tap_columns
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

STRETCH = 2048  # tokens of a long causal pass that are worked on at once: what lies between stays in the cache


@register
class DynamicConvolution(Mechanism):
    """Each token predicts, from itself alone, the kernel of a short convolution that replaces attention.

        u = GLU(W_in x);  w_t = softmax over taps of (W_k u_t)  [heads, K];  y_t = W_out sum_k w_tk u_(t - left + k)

    Head h weighs a contiguous group of dim / heads channels. left = K - 1 when causal, else K // 2, the paper's centre.
    Taps outside the sequence, on padding or forbidden by a dense mask add nothing; the others are not raised in their
    place. Weights are a band of width K. The state is the last K - 1 rows of u.

    Source: Wu et al., Pay Less Attention with Lightweight and Dynamic Convolutions, arXiv:1901.10430. Follows the
    released DynamicConv (contiguous channel groups, no bias on W_k) without its drop-out of taps. bias: of W_in, W_out.
    """

    card = Card(
        name="dynamic-convolution",
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

    def __init__(self, dim: int, heads: int, *, causal: bool = False, kernel_size: int = 15, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if kernel_size < 2:
            raise ValueError(
                f"{self.card.name}: kernel_size={kernel_size}; want at least 2, a softmax over one tap is 1"
            )
        self.kernel_size = kernel_size
        self.left = kernel_size - 1 if causal else kernel_size // 2
        self.in_proj = nn.Linear(dim, 2 * dim, bias=bias)
        self.kernel_proj = nn.Linear(dim, heads * kernel_size, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        n, seen = x.shape[1], call.seen
        if n > STRETCH and self.causal and not (call.need_weights or call.across) and call.dense is None:
            return Result(self._in_stretches(x, call))
        u = F.glu(self.in_proj(x), -1)
        logits = self.kernel_proj(u).unflatten(-1, (self.heads, self.kernel_size))
        taps = logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if call.padding is None else call.padding
        if call.padding is not None:
            u = u.masked_fill(~real[..., None], 0.0)
        rows, real = surround(u, real, self.left, self.kernel_size - 1 - self.left, call.state, call.across)
        columns = tap_columns(n, seen, self.left, self.kernel_size, x.device)
        if call.dense is not None:
            taps = taps * dense_at_taps(call.dense, columns)
        mixed = self._convolve(rows, taps)
        weights = None
        if call.need_weights:
            seen_taps = taps * real.unfold(1, self.kernel_size, 1)[:, :, None]
            weights = band_matrix(seen_taps, columns, seen + n)
        return Result(self.out_proj(mixed), weights)

    def _in_stretches(self, x: Tensor, call: Call) -> Tensor:
        """A long pass as several with a state."""
        state = self.init_state(x.shape[0]) if call.state is None else call.state
        outputs = []
        for start in range(0, x.shape[1], STRETCH):
            now = slice(start, start + STRETCH)
            padding = None if call.padding is None else call.padding[:, now]
            outputs.append(self.attend(x[:, now], None, replace(call, padding=padding, state=state)).output)
        return torch.cat(outputs, 1)

    def _convolve(self, rows: Tensor, taps: Tensor) -> Tensor:
        """rows [b, n + K - 1, e], taps [b, n, h, K] -> [b, n, e]; one tap at a time, so that no window is copied."""
        n = taps.shape[1]
        rows = rows.unflatten(-1, (self.heads, self.head_dim))
        mixed = taps[..., :1] * rows[:, :n]
        for k in range(1, self.kernel_size):
            mixed = torch.addcmul(mixed, taps[..., k : k + 1], rows[:, k : k + n])
        return mixed.flatten(-2)
