"""Selective self-attention: every query has its own temperature, and every value its own size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_scores
from manyheads.functional.linear import widen
from manyheads.functional.passes import attend_where
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where


@register
class SelectiveTemperature(SoftmaxAttention):
    """Queries decide how sharply they look, by what they are and by how much there is to look at.

        softmax(t_i q_i . k_j / sqrt(d)) u_j v_j,  u_j = 1 + tanh(w_v . v_j),
        t_i = tanh(w_q . q_i) + 1 + sigmoid(a) log n_i

    n_i: number of tokens that query i sees, its position + 1 where causal, else the real keys. w_q, w_v: [heads, d];
    a: one number. All temperatures start near one.
    Source: Zhang et al., Selective Attention, arXiv:2411.12892. The released code has the position part alone, as
    1 + exp(-exp(beta)) log i, whose factor in (0, 1) is sigmoid(a) here, started at its value for beta = 1.5. The paper
    lets a small network f(x) make the token part and shares its weights with the attention; here it is linear in the
    projected query and value, which is our reading of that.
    """

    card = Card(
        name="selective-temperature",
        title="Selective Attention: Enhancing Transformer through Principled Context Control",
        reference="arXiv:2411.12892",
        family=Family.SCORING,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2",
        state="n",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        self.query_selector = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.value_selector = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.position_logit = nn.Parameter(torch.tensor(-4.47))

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, source)
        return q, k, v * (1 + _token(v, self.value_selector))

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        return grouped_scores(self._tempered(q, where) * self.scale, k)

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        return attend_where(self._tempered(q, where), k, v, where, scale=self.scale)[0]

    def _tempered(self, q: Tensor, where: Where) -> Tensor:
        if where.causal:
            visible = where.query_positions + 1
        elif where.padding is None:
            visible = torch.full_like(where.query_positions, len(where.j))
        else:
            visible = where.padding.sum(1, keepdim=True)
        growth = widen(visible.clamp(min=1).to(q.dtype)).log().to(q.dtype)[:, None, :, None]
        return q * (_token(q, self.query_selector) + 1 + self.position_logit.sigmoid() * growth)


def _token(rows: Tensor, selector: Tensor) -> Tensor:
    """rows [b, h, n, d], selector [h, d] -> [b, h, n, 1] in (-1, 1)."""
    return (rows @ selector[..., None]).tanh()
