"""Neighborhood attention along one axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary
from manyheads.functional.spans import attend_spans, real_span
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where


@register
class Neighborhood(SoftmaxAttention):
    """Every token attends to the `window` tokens nearest to it; at the ends the window is moved inward, not cut.

        s_i = clamp(i - window // 2, 0, L - window),  softmax over j in [s_i, s_i + window) of q_i . k_j / sqrt(d)

    dilation: the rule holds within each of the `dilation` interleaved subsequences. A subsequence shorter than the
    window is seen whole (NATTEN refuses it). Causal: the newest `window` tokens of the subsequence, fewer at the start.
    L is the number of tokens from the first to the last real one, so that padding moves no window.

    Source: arXiv:2204.07143 (the rule), arXiv:2209.15001 (dilation), arXiv:2403.04690 (1-D, causal, even windows: one
    more token before than behind). The relative position bias of the first of them is left out, as in NATTEN's fused
    kernels.
    """

    card = Card(
        name="neighborhood",
        title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        reference="arXiv:2403.04690",
        family=Family.SELECTION,
        patterns={"noncausal-self", "causal-self"},
        time="n w",
        state="w",
        example={"window": 3},
        notes="A layer sees window * dilation tokens; reach grows with depth.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 63,
        dilation: int = 1,
        kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)
        if window < 1 or dilation < 1:
            raise ValueError(f"{self.card.name}: window={window} and dilation={dilation} must be positive")
        self.window, self.dilation = window, dilation
        if causal:
            self.span = (window - 1) * dilation + 1

    def select(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        near = self._near(where, where.i, where.j)
        allowed = where.allowed()
        return near if allowed is None else near & allowed

    def _near(self, where: Where, i: Tensor, j: Tensor) -> Tensor:
        """The rule for queries i and keys j, [b or 1, 1, len(i), len(j)]."""
        i, j = i[:, None], j[None, :]
        lag = i - j
        same = lag % self.dilation == 0
        if self.causal:
            return (same & (lag >= 0) & (lag < self.window * self.dilation))[None, None]
        begin, end = real_span(where.padding, len(where.j), i.device)
        place, length = i - begin, end - begin
        step, members = place // self.dilation, (length - place % self.dilation - 1) // self.dilation + 1
        first = (step - self.window // 2).minimum(members - self.window).clamp(min=0)
        key = (j - begin) // self.dilation
        inside = same & (key >= first) & (key < first + self.window)
        return (inside & (place >= 0) & (place < length))[:, None]

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        if where.dense is not None:
            return super().fused(q, k, v, where)
        mixed, n, m = torch.empty_like(q), q.shape[2], k.shape[2]
        for start in range(min(self.dilation, n)):
            # The keys of this subsequence: those that stand where its queries do, modulo the dilation.
            offset = (start + m - n) % self.dilation
            mixed[:, :, start :: self.dilation] = self._subsequence(q, k, v, where, start, offset)
        return mixed

    def _subsequence(self, q: Tensor, k: Tensor, v: Tensor, where: Where, start: int, offset: int) -> Tensor:
        """Every dilation-th query from `start` on, on every dilation-th key from `offset` on."""
        queries, keys, values = q[:, :, start :: self.dilation], *(t[:, :, offset :: self.dilation] for t in (k, v))
        i, j = where.i[start :: self.dilation], where.j[offset :: self.dilation]
        padding = None if where.padding is None else where.padding[:, offset :: self.dilation]
        behind = (start + k.shape[2] - q.shape[2] - offset) // self.dilation

        def reach(rows: slice) -> slice:
            last = rows.stop + behind + (0 if self.causal else self.window - 1)
            return slice(max(rows.start + behind - self.window + 1, 0), min(last, len(j)))

        def allowed(rows: slice, columns: slice) -> Tensor:
            near = self._near(where, i[rows], j[columns])
            return near if padding is None else near & padding[:, None, None, columns]

        return attend_spans(queries, keys, values, reach, allowed, scale=self.scale)
