"""Multi-window multi-head attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import attend_grouped, attend_masked, masked_softmax
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where


@register
class MultiWindow(SoftmaxAttention):
    """Each head attends within non-overlapping windows of a size of its own, the last heads to everything.

        softmax over j with j // w_h = i // w_h of (q_i^h . k_j^h / sqrt(d) + b^h_(i - j)), times v_j^h

    windows: one size per head, 0 for a global head; by default 2, 4, 8, .. up to 512, and 0 for the last quarter of the
    heads. The paper takes factors of its fixed length, and its code wants them to divide the length; here the last
    window is shorter where they do not.
    b: learned, 2 w - 1 numbers per windowed head and none for a global one, as in the released code, whose option of
    shifted windows is left out. Source: arXiv:2306.00561 and its released code.
    Weights: the code's qkv is q, k, v in this order; relative holds attn_heads.h.relative_position_bias_table[:, 0] of
    the windowed heads, in order.
    """

    shares_kv = False
    card = Card(
        name="multi-window",
        title="Masked Autoencoders with Multi-Window Local-Global Attention Are Better Audio Learners",
        reference="arXiv:2306.00561",
        family=Family.SELECTION,
        patterns={"noncausal-self"},
        time="n w + n^2",
        state="",
        decodes=False,
        example={"windows": [2, 3, 8, 0]},
        notes="not causal: windows are seen whole. Global heads cost n^2.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        windows: Sequence[int] | None = None,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        if windows is None:
            windows = [2 * 2 ** min(h, 8) for h in range(heads - max(heads // 4, 1))]
            windows += [0] * (heads - len(windows))
        if len(windows) != heads or min(windows) < 0:
            raise ValueError(
                f"{self.card.name}: windows={list(windows)} for heads={heads}; want one size per head, 0 for global"
            )
        self.windows = list(windows)
        self.relative = nn.ParameterList(nn.Parameter(0.02 * torch.randn(2 * w - 1)) for w in self.windows if w)

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        lag = where.i[:, None] - where.j
        biases = iter(self.relative)
        rows = [
            next(biases)[lag.clamp(1 - w, w - 1) + w - 1].to(q.dtype) if w else torch.zeros_like(lag, dtype=q.dtype)
            for w in self.windows
        ]
        return super().score(q, k, where) + torch.stack(rows)

    def mask_mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # A global head is one whose window is longer than any sequence.
        window = torch.tensor([w or 1 << 62 for w in self.windows], device=i.device)[h]
        return i // window == j // window

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        if where.dense is not None:
            return None
        biases = iter(self.relative)
        parts = []
        for h, window in enumerate(self.windows):
            head = (q[:, h], k[:, h], v[:, h])
            parts.append(
                self._windowed(*head, next(biases), window, where.padding)
                if window
                else self._global(*head, where.padding)
            )
        return torch.stack(parts, 1)

    def _global(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        q, k, v = (t[:, None] for t in (q, k, v))
        if padding is None:
            return attend_grouped(q, k, v, scale=self.scale).squeeze(1)
        return attend_masked(q, k, v, padding[:, None, None], scale=self.scale).squeeze(1)

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int, padding: Tensor | None) -> Tensor:
        """q, k, v [b, n, d], bias [2 window - 1] -> [b, n, d]."""
        n = q.shape[1]
        width = min(window, n)
        more = -n % width
        q, k, v = (F.pad(t, (0, 0, 0, more)).unflatten(1, (-1, width)) for t in (q, k, v))
        real = torch.arange(n + more, device=q.device)[None] < n
        if padding is not None:
            real = real & F.pad(padding, (0, more))
        place = torch.arange(width, device=q.device)
        scores = q * self.scale @ k.mT + bias[place[:, None] - place + window - 1].to(q.dtype)
        allowed = real.unflatten(1, (-1, width))[:, :, None]
        return (masked_softmax(scores, allowed) @ v).flatten(1, 2)[:, :n]
