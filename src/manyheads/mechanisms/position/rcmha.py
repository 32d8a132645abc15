"""Relative convolutional multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.layers import plain_weight
from manyheads.functional.passes import joined
from manyheads.functional.skew import skew
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

# Up to so many tokens one product for all is cheaper than three convolutions.
FEW = 64


@register
class RCMHA(Mechanism):
    """Depthwise convolutions along the sequence on queries, keys and values, and Transformer-XL's relative scores.

        q, k, v = conv(W_q x), conv(W_k x), conv(W_v x + b);
        softmax_j(((q_i + u) . k_j + q_i . E[j - i] + beta[j - i]) / sqrt(d)) v_j,   then W_o with a bias

    conv sees `kernel` tokens up to its own, one filter per feature of a head, the same for all heads, with a bias. u
    [heads, d]; E [heads, 2 max_length - 1, d] and beta by distance are learned (causal: max_length rows), in place of
    Transformer-XL's sinusoids, and start at zero with u. Padded tokens are zero to the convolutions.
    Source: arXiv:2308.03429, and its code (RelativeMultiHeadAttention). Distances are between places in
    the sequence. The convolutions are causal in the code; so they are here, also where attention is not.
    Weights: distances[h, max_length - 1 + r] is key_pos_embeddings[4096 + r, h] for the distance r = j - i, and
    distance_bias likewise.
    """

    card = Card(
        name="rcmha",
        title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
        reference="arXiv:2308.03429",
        family=Family.POSITION,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        example={"max_length": 81},
        notes="no longer than max_length tokens",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, max_length: int = 4096, kernel: int = 3) -> None:
        super().__init__(dim, heads, causal=causal)
        d = self._split_heads()
        if max_length < 1 or kernel < 1:
            raise ValueError(f"rcmha: max_length={max_length} and kernel={kernel} must be positive")
        self.scale, self.max_length, self.kernel = d**-0.5, max_length, kernel
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.q_conv, self.k_conv, self.v_conv = (nn.Conv1d(d, d, kernel, groups=d) for _ in range(3))
        rows = max_length if causal else 2 * max_length - 1
        self.distances = nn.Parameter(torch.zeros(heads, rows, d))
        self.distance_bias = nn.Parameter(torch.zeros(heads, rows))
        self.query_bias = nn.Parameter(torch.zeros(heads, d))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        m = call.seen + x.shape[1]
        if m > self.max_length:
            raise ValueError(
                f"rcmha: {m} tokens (x has shape {tuple(x.shape)}), but it was built with "
                f"max_length={self.max_length}; build it with a larger one, or shorten the input"
            )
        q, k, v = self._convolved(x, call)
        where, (k, v) = joined(call, x, self.causal, keys=k, values=v)
        content = grouped_scores(q + self.query_bias[:, None], k)
        scores = (content + self._relative(q, m)) * self.scale
        weights = masked_softmax(scores, where.allowed())
        mixed = self.offered(q, k, v, grouped_mix(weights, v), weights, where)
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return Result(output, weights if call.need_weights else None)

    def _convolved(self, x: Tensor, call: Call) -> tuple[Tensor, ...]:
        """q, k, v [b, h, n, d] behind their convolutions; the state holds what the next tokens' filters reach."""
        rows = torch.stack([self.q_proj(x), self.k_proj(x), self.v_proj(x)], 1)
        if call.padding is not None:
            rows = rows.masked_fill(~call.padding[:, None, :, None], 0.0)
        back, state = self.kernel - 1, call.state
        if state is not None and "tail" in state.fixed:
            rows = torch.cat([state.fixed["tail"], rows], 2)
        else:
            rows = F.pad(rows, (0, 0, back, 0))
        if state is not None:
            state.fixed["tail"] = rows[:, :, rows.shape[2] - back :].clone()
        convs = (self.q_conv, self.k_conv, self.v_conv)
        weights = [weight for weight in map(plain_weight, convs) if weight is not None]
        if len(weights) < len(convs) or x.shape[1] > FEW:
            each = rows.unflatten(-1, (self.heads, -1)).permute(1, 0, 3, 4, 2).flatten(1, 2)
            return tuple(conv(t).unflatten(0, (-1, self.heads)).mT for conv, t in zip(convs, each, strict=True))
        bias = torch.stack([conv.bias for conv in convs if conv.bias is not None])
        windows = rows.unflatten(-1, (self.heads, -1)).unfold(2, self.kernel, 1)
        filters = torch.stack([weight[:, 0] for weight in weights])
        out = torch.einsum("bcnhdk,cdk->bchnd", windows, filters) + bias[:, None, None]
        return out.unbind(1)

    def _relative(self, q: Tensor, m: int) -> Tensor:
        """q . E[j - i] + beta[j - i], [b, h, n, m]. Column max_length - 1 of the tables is distance zero."""
        last = self.max_length + (0 if self.causal else q.shape[2] - 1)
        rows = slice(self.max_length - m, last)
        by_distance = q @ self.distances[:, rows].transpose(-1, -2) + self.distance_bias[:, None, rows]
        return skew(by_distance, m)
