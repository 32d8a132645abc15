"""Multi-scale self-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary
from manyheads.functional.spans import attend_spans, real_span
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where

SCALES = (1, 3, 1 / 16, 1 / 8, 1 / 4)


@register
class MultiScale(SoftmaxAttention):
    """Each head sees a symmetric window of a scale of its own, fixed or a share of the length.

        softmax over |j - i| <= w_h of (q_i^h . k_j^h / sqrt(d)), times v_j^h

    scales: one per head. An integer is w_h itself; a fraction s below 1 gives w_h = max(1, floor(s N)), with N the
    number of tokens from the first to the last real one. By default the five scales 1, 3, N/16, N/8, N/4 are dealt out
    evenly, small ones first. The paper gives shallow layers more small scales: give each layer its own `scales`.

    Source: arXiv:1912.00544, without released code. Its abstract and section 1 were compared; the window of w tokens on
    each side and the five scales are as remembered of its section 3, and its rule for layers is left to the caller.
    """

    shares_kv = False
    card = Card(
        name="multi-scale",
        title="Multi-Scale Self-Attention for Text Classification",
        reference="arXiv:1912.00544",
        family=Family.SELECTION,
        patterns={"noncausal-self"},
        time="n w",
        state="",
        decodes=False,
        example={"scales": [1, 2, 0.125, 0.25]},
        notes="not causal: windows are symmetric, and a share of the length is known at the end only",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        scales: Sequence[float] | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        if scales is None:
            scales = [SCALES[h * len(SCALES) // heads] for h in range(heads)]
        if len(scales) != heads or any(s <= 0 or (s >= 1 and s != int(s)) for s in scales):
            raise ValueError(
                f"{self.card.name}: scales={list(scales)} for heads={heads}; want one per head, each a positive whole "
                "number of tokens or a fraction of the length below 1"
            )
        self.scales = list(scales)

    def select(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        near = torch.cat([self._near(where, scale, where.i, where.j) for scale in self.scales], 1)
        allowed = where.allowed()
        return near if allowed is None else near & allowed

    def _near(self, where: Where, scale: float, i: Tensor, j: Tensor) -> Tensor:
        """[b or 1, 1, len(i), len(j)]"""
        begin, end = real_span(where.padding, len(where.j), i.device)
        reach = torch.full_like(end, int(scale)) if scale >= 1 else _share(scale, end - begin)
        return ((i[:, None] - j).abs() <= reach)[:, None]

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        if where.dense is not None:
            return super().fused(q, k, v, where)
        parts = [self._head(q, k, v, h, where) for h in range(self.heads)]
        return torch.cat(parts, 1)

    def _head(self, q: Tensor, k: Tensor, v: Tensor, h: int, where: Where) -> Tensor:
        m, scale = k.shape[2], self.scales[h]
        far = int(scale) if scale >= 1 else max(int(scale * m), 1)

        def reach(rows: slice) -> slice:
            return slice(max(rows.start - far, 0), min(rows.stop + far, m))

        def allowed(rows: slice, keys: slice) -> Tensor:
            near = self._near(where, scale, where.i[rows], where.j[keys])
            return near if where.padding is None else near & where.padding[:, None, None, keys]

        return attend_spans(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], reach, allowed, scale=self.scale)


def _share(scale: float, length: Tensor) -> Tensor:
    """max(1, floor(scale * length)), in the same double precision as Python's."""
    return (scale * length.double()).floor().long().clamp(min=1)
