"""Multi-scale window attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.banded import banded_attention
from manyheads.functional.lengths import within
from manyheads.functional.rotary import Rotary
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where
from manyheads.state import State


@register
class MSWA(SoftmaxAttention):
    """Sliding windows of four sizes, a quarter of the heads each: near and far context for 15/16 of one window's cost.

        softmax(q_i^h . k_j^h / sqrt(d)) v_j^h, summed over i - w_h < j <= i,
        w_h = window / 4, window / 2, window, 2 window for the four quarters of the heads, in this order.

    window: the base size; a multiple of 4, so that nothing is rounded; a token counts itself. heads: a multiple of 4.
    The paper varies the base over depth as well (a quarter of the layers each at w/4, w/2, w, 2w, shallow ones small):
    give each layer its own `window`.
    Source: arXiv:2501.01039; no code was released. The state keeps 2 window tokens of all heads, as far as the widest
    sees, where the paper's cache has a length per group of heads, 15/16 window on average.
    """

    card = Card(
        name="mswa",
        title="MSWA: Refining Local Attention with Multi-Scale Window Attention",
        reference="arXiv:2501.01039",
        family=Family.SELECTION,
        patterns={"causal-self"},
        time="n w",
        state="2 w",
        parallel="halo",
        example={"window": 4},
        notes="A layer sees no further back than 2 window tokens; reach grows with depth. With windows of 4 to 32 "
        "tokens, which do not reach every pair: 75% on quick recall, 75% in five times the steps.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 256,
        kv_heads: int | None = None,
        causal: bool = True,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)
        if heads % 4:
            raise ValueError(f"mswa: heads={heads} cannot be cut into four equal groups; want a multiple of 4")
        if window < 4 or window % 4:
            raise ValueError(f"mswa: window={window} has no exact quarter; want a positive multiple of 4")
        self.window = window
        self.head_windows = self.windows = [window // 4 * 2 ** (h * 4 // heads) for h in range(heads)]
        self.span: int = 2 * window

    def init_state(self, batch: int, *, capacity: int = 0) -> State:
        """Room for twice the span is enough at any length: the state stays as large as it starts."""
        room = 2 * self.span
        return super().init_state(batch, capacity=min(capacity, room) if capacity else room)

    def mask_mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i - j < self.window // 4 * 2 ** (h * 4 // self.heads)

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        # Up to one window of queries, one small mask for all heads costs less than a band for each.
        if where.dense is not None or within(q.shape[2], self.window):
            return super().fused(q, k, v, where)
        return banded_attention(q, k, v, self.windows, scale=self.scale, padding=where.padding)
