"""Skim-Attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class Skim(Mechanism):
    """Tokens attend by where they stand on the page alone; what they say is only what is read.

        l = LayerNorm(layout),  A = softmax(l W_q (l W_k)^T / sqrt(d)),  output = A (text W_v) W_o

    The last `side_dim` features of x are the layout: the sum of the embeddings of a token's box (x0, y0, x1, y1, height
    and width), made before they come here. The features before are the text; A is the same in every layer that gets
    the same layout and weights.
    top_k: the mask form (SkimmingMask). The k largest A of each query and head are the keys it may attend to with
    ordinary attention of the text. W_q, W_k and the norm get no gradient there: they come from a trained Skimformer.
    Fewer than k real tokens: all of them.
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
        example={"side_dim": 6},
        inputs={"layout": "the embedded boxes of the tokens on their page, [b, n, side_dim]"},
        notes="a document is read as a whole: no causal form",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, side_dim: int = 4, top_k: int | None = None
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.scale = self._split_heads() ** -0.5
        if not 1 <= side_dim < dim:
            raise ValueError(f"skim: side_dim={side_dim}, dim={dim}; want 1 <= side_dim < dim, as the rest is the text")
        if top_k is not None and top_k < 1:
            raise ValueError(f"skim: top_k={top_k} must be positive (None: no mask form)")
        self.side_dim, self.top_k = side_dim, top_k
        self.layout_norm = nn.LayerNorm(side_dim)
        self.layout_q_proj = nn.Linear(side_dim, dim)
        self.layout_k_proj = nn.Linear(side_dim, dim)
        text = dim - side_dim
        self.v_proj = nn.Linear(text, dim)
        self.o_proj = nn.Linear(dim, dim)
        if top_k is not None:
            self.q_proj, self.k_proj = nn.Linear(text, dim), nn.Linear(text, dim)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        text, layout = x.split([self.dim - self.side_dim, self.side_dim], -1)
        layout = self.layout_norm(layout)
        q, k, v = (self._split(t) for t in (self.layout_q_proj(layout), self.layout_k_proj(layout), self.v_proj(text)))
        allowed = call.dense if call.padding is None else call.padding[:, None, None]
        if self.top_k is None:
            mixed, weights = attend_weighted(q, k, v, allowed, scale=self.scale, need_weights=call.need_weights)
        else:
            chosen = self._chosen(grouped_scores(q * self.scale, k), allowed, self.top_k)
            weights = masked_softmax(
                grouped_scores(self._split(self.q_proj(text)) * self.scale, self._split(self.k_proj(text))), chosen
            )
            mixed = grouped_mix(weights, v)
        mixed = self.offered(q, k, v, mixed, weights, allowed)
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return Result(output, weights if call.need_weights else None)

    def _chosen(self, scores: Tensor, allowed: Tensor | None, k: int) -> Tensor:
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        top = scores.detach().topk(min(k, scores.shape[-1]), -1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True)
        return chosen if allowed is None else chosen & allowed

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
