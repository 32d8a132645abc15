"""Set Transformer: attention through induced points, and pooling by attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


class AttentionBlock(nn.Module):
    """MAB(X, Y) = LN(H + relu(W_o H)), H = LN(W_q X + softmax(W_q X (W_k Y)^T / sqrt(dim)) W_v Y per head).

    As in the released code: what is added is the projected query, the scale is that of the whole dimension and not of
    a head, and the normalisations (norm) are off by default; the paper adds X itself and always normalises.
    """

    def __init__(self, dim: int, heads: int, *, norm: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.first_norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.second_norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor, y: Tensor, padding: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """x [b, n, e], y [b, m, e], padding [b, m] -> [b, n, e] and weights [b, h, n, m] where asked for."""
        projected = self.q_proj(x)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (projected, self.k_proj(y), self.v_proj(y))
        )
        allowed = None if padding is None else padding[:, None, None, :]
        mixed, weights = attend_weighted(q, k, v, allowed, scale=self.scale, need_weights=need_weights)
        hidden = self.first_norm(projected + mixed.transpose(1, 2).flatten(-2))
        return self.second_norm(hidden + self.o_proj(hidden).relu()), weights


def _no_dense(mechanism: Mechanism, call: Call) -> None:
    if call.dense is not None:
        raise ValueError(
            f"{mechanism.card.name}: a dense mask was given, but tokens meet only through learned points; give key "
            "padding [batch, m] as the mask"
        )


def _points(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(count, dim)))


@register
class InducedSetAttention(Mechanism):
    """A few learned points gather the tokens; every token then asks the points: linear in the number of tokens.

        ISAB(X) = MAB(X, MAB(I, X)),  I: [points, dim] learned;  MAB: AttentionBlock above, with its residuals

    Permuting the tokens permutes the outputs. With a context, MAB(X, MAB(I, context)), which is not in the paper.
    Matrix: softmax(X H) softmax(I X), the paths of attention from token to token, beside the residuals and layers.
    Source: Lee et al., Set Transformer, arXiv:1810.00825, in the form of its released code (see AttentionBlock).
    Weights: points is I[0]; gather, spread are mab0, mab1.
    """

    card = Card(
        name="induced-set",
        title="Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks (ISAB)",
        reference="arXiv:1810.00825",
        family=Family.TOKENS,
        patterns={"noncausal-self", "noncausal-cross"},
        time="n points",
        state="",
        decodes=False,
        example={"points": 3, "norm": True},
        notes="no causal form: the points gather the whole set",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, points: int = 32, norm: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        if points < 1:
            raise ValueError(f"induced-set: points={points} must be at least 1: so many learned points gather the set")
        self.points = _points(points, dim)
        self.gather = AttentionBlock(dim, heads, norm=norm)
        self.spread = AttentionBlock(dim, heads, norm=norm)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        _no_dense(self, call)
        source = x if context is None else context
        points = self.points.expand(x.shape[0], -1, -1)
        hidden, gathered = self.gather(points, source, call.padding, call.need_weights)
        output, spread = self.spread(x, hidden, None, call.need_weights)
        return Result(output, None if gathered is None or spread is None else spread @ gathered)


@register
class AttentionPooling(Mechanism):
    """A learned seed asks the set: a vector out of any number of tokens.

        PMA(X) = MAB(S, rFF(X)),  S: [1, dim] learned, rFF(X) = relu(W X) per token

    x: [b, n, dim] -> [b, dim], whatever the order of the tokens; weights: [b, heads, 1, n].
    Source: Lee et al., Set Transformer, arXiv:1810.00825, whose k seeds are one here: a pool gives one vector.
    rFF is in the paper, and not in the released code (feed_forward=False).
    Weights: seed is S[0].
    """

    card = Card(
        name="attention-pooling",
        title="Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks (PMA)",
        reference="arXiv:1810.00825",
        family=Family.TOKENS,
        patterns={"pool"},
        time="n",
        state="",
        decodes=False,
        notes="a pool: the result has no time axis to decode along",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, feed_forward: bool = True, norm: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.seed = _points(1, dim)
        self.feed_forward = nn.Linear(dim, dim) if feed_forward else None
        self.pool = AttentionBlock(dim, heads, norm=norm)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        _no_dense(self, call)
        if self.feed_forward is not None:
            x = self.feed_forward(x).relu()
        output, weights = self.pool(self.seed.expand(x.shape[0], -1, -1), x, call.padding, call.need_weights)
        return Result(output[:, 0], weights)
