"""Skim-Attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.boxes import TABLES, box_rows, layout_of
from manyheads.functional.grouped import grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class Skim(Mechanism):
    """Tokens attend by where they stand on the page alone; what they say is only what is read.

        l = LayerNorm(X[x0] + X[x1] + Y[y0] + Y[y1] + H[y1 - y0] + W[x1 - x0])
        A = softmax(l W_q (l W_k)^T / sqrt(d)),  output = A (x W_v) W_o

    boxes [b, n, 4]: x0, y0, x1, y1 of each token on its page, integers from 0 to places - 1; of padding they may be
    anything. X, Y, H and W are tables of `side_dim` features per place. A is the same in every layer that has the same
    tables and weights.
    top_k: the mask form (SkimmingMask). The k largest A of each query and head are the keys it may attend to with
    ordinary attention of the text. W_q, W_k, the tables and the norm get no gradient there: they come from a trained
    Skimformer. Fewer than k real tokens: all of them.
    `skimmed` gives these keys as a mask for a model of somebody else's. Layers of `shared-weights` above this one take
    A over, which is then computed once.
    Padding takes no place among the k, as in the code, which masks before it chooses.
    Source: Nguyen et al., arXiv:2109.01078, and its code, whose layers add residuals and norms around this one, and
    which can pass the layout through an encoder of its own first.
    """

    card = Card(
        name="skim",
        title="Skim-Attention: Learning to Focus via Document Layout",
        reference="arXiv:2109.01078",
        family=Family.POSITION,
        patterns={"noncausal-self"},
        time="n^2",
        state="",
        decodes=False,
        example={"side_dim": 6, "places": 32},
        takes={"boxes": "[b, n, 4] integers, x0, y0, x1, y1 of each token on its page"},
        notes="a document is read as a whole: no causal form",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        side_dim: int = 64,
        places: int = 1024,
        top_k: int | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.scale = self._split_heads() ** -0.5
        if side_dim < 1 or places < 1:
            raise ValueError(f"skim: side_dim={side_dim}, places={places}; want at least 1 of each")
        if top_k is not None and top_k < 1:
            raise ValueError(f"skim: top_k={top_k} must be positive (None: no mask form)")
        self.side_dim, self.places, self.top_k = side_dim, places, top_k
        self.tables = nn.Parameter(torch.randn(TABLES, places, side_dim))  # by x, y, height, width
        self.layout_norm = nn.LayerNorm(side_dim)
        self.layout_q_proj = nn.Linear(side_dim, dim)
        self.layout_k_proj = nn.Linear(side_dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        if top_k is not None:
            self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        i = torch.arange(n)
        left, top = 5 * i % self.places, 3 * i % self.places
        right, bottom = ((t + i % 4).clamp(max=self.places - 1) for t in (left, top))
        return {"boxes": torch.stack([left, top, right, bottom], -1)[None]}

    def layout(self, x: Tensor, boxes: Any, padding: Tensor | None) -> Tensor:
        """l [b, n, side_dim] of x [b, n, e]. ValueError for boxes of another shape or type, or off the page."""
        return self.layout_norm(layout_of(self.tables, box_rows("skim", boxes, x, padding, self.places)))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        layout = self.layout(x, call.inputs["boxes"], call.padding)
        q, k, v = (self._split(t) for t in (self.layout_q_proj(layout), self.layout_k_proj(layout), self.v_proj(x)))
        allowed = call.dense if call.padding is None else call.padding[:, None, None]
        if self.top_k is None:
            mixed, weights = attend_weighted(q, k, v, allowed, scale=self.scale, need_weights=call.need_weights)
        else:
            chosen = self._chosen(grouped_scores(q * self.scale, k), allowed, self.top_k)
            weights = masked_softmax(
                grouped_scores(self._split(self.q_proj(x)) * self.scale, self._split(self.k_proj(x))), chosen
            )
            mixed = grouped_mix(weights, v)
        mixed = self.offered(q, k, v, mixed, weights, allowed)
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return Result(output, weights if call.need_weights else None)

    @torch.no_grad()
    def skimmed(self, boxes: Tensor, top_k: int, *, mask: Tensor | None = None) -> Tensor:
        """The keys that each query may attend to, [b, heads, n, n], True = may: the top_k largest A. mask: [b, n], True
        = real. For BERT and its like, of as many heads, as what is added to scores: attention_mask =
        zeros.masked_fill(~skimmed, finfo(dtype).min); a boolean one its eager attention would add as 0 and 1."""
        if top_k < 1:
            raise ValueError(f"skim: top_k={top_k} must be positive")
        if not isinstance(boxes, Tensor) or boxes.ndim != 3:
            raise ValueError(
                f"skim: boxes are {getattr(boxes, 'shape', type(boxes).__name__)}; want integers [b, n, 4]"
            )
        layout = self.layout(boxes[..., :1], boxes, mask)
        q, k = self._split(self.layout_q_proj(layout)), self._split(self.layout_k_proj(layout))
        return self._chosen(grouped_scores(q * self.scale, k), None if mask is None else mask[:, None, None], top_k)

    def _chosen(self, scores: Tensor, allowed: Tensor | None, k: int) -> Tensor:
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        top = scores.detach().topk(min(k, scores.shape[-1]), -1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True)
        return chosen if allowed is None else chosen & allowed

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
