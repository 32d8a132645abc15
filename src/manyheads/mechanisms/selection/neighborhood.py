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
    stride: so many neighbours in a subsequence share a window, that of the one at stride // 2 of them (causal: of the
    last one, cut at each query). L is the number of tokens from the first to the last real one, so that padding moves
    no window; causal groups are counted by position.

    Source: arXiv:2204.07143 (the rule), arXiv:2209.15001 (dilation), arXiv:2403.04690 (1-D, causal, even windows: one
    more token before than behind), arXiv:2504.16922 (stride). The relative position bias of the first of them is left
    out, as in NATTEN's fused kernels. There the last causal group, if the length cuts it, is led by the last token, so
    that queries see less once more tokens come; here it is led as if it were whole, so that decoding is one pass.
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
        stride: int = 1,
        kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)
        if window < 1 or dilation < 1:
            raise ValueError(f"{self.card.name}: window={window} and dilation={dilation} must be positive")
        if not 1 <= stride <= window:
            raise ValueError(f"{self.card.name}: stride={stride} with window={window}; want 1 <= stride <= window")
        self.window, self.dilation, self.stride = window, dilation, stride
        if causal:
            self.span = (window - 1) * dilation + 1

    def select(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        near = self._near(where, where.i, where.j, where.query_positions)
        allowed = where.allowed()
        return near if allowed is None else near & allowed

    def _near(self, where: Where, i: Tensor, j: Tensor, positions: Tensor) -> Tensor:
        """The rule for queries i, at positions [b or 1, len(i)], and keys j: [b or 1, 1, len(i), len(j)]."""
        i, j = i[:, None], j[None, :]
        lag = i - j
        same = lag % self.dilation == 0
        if self.causal:
            # How far the leader of the group stands ahead: its window reaches less far back from here.
            ahead = self.stride - 1 - (positions // self.dilation % self.stride)[:, None, :, None]
            return same & (lag >= 0) & (lag < (self.window - ahead) * self.dilation)
        begin, end = real_span(where.padding, len(where.j), i.device)
        place, length = i - begin, end - begin
        step, members = place // self.dilation, (length - place % self.dilation - 1) // self.dilation + 1
        leader = (step // self.stride * self.stride + self.stride // 2).minimum(members - 1)
        first = (leader - self.window // 2).minimum(members - self.window).clamp(min=0)
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
        positions = where.query_positions[:, start :: self.dilation]
        padding = None if where.padding is None else where.padding[:, offset :: self.dilation]
        behind = (start + k.shape[2] - q.shape[2] - offset) // self.dilation

        # As a stride is no wider than the window, a leader's window still ends less than a window from its queries.
        def reach(rows: slice) -> slice:
            last = rows.stop + behind + (0 if self.causal else self.window - 1)
            return slice(max(rows.start + behind - self.window + 1, 0), min(last, len(j)))

        def allowed(rows: slice, columns: slice) -> Tensor:
            near = self._near(where, i[rows], j[columns], positions[:, rows])
            return near if padding is None else near & padding[:, None, None, columns]

        return attend_spans(queries, keys, values, reach, allowed, scale=self.scale)
