"""Monotonic multi-head attention: heads walk along the context and never turn back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, grouped_scores
from manyheads.functional.linear import widen
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class Monotonic(SoftmaxAttention):
    """Each head stands at one place of the context; for every query it walks on until it decides to stop.

        p_ij = sigmoid(q_i . k_j / sqrt(d) + r);  a_ij = p_ij sum_{k <= j} a_{i-1,k} prod_{k <= l < j} (1 - p_il)
        out_i = sum_j a_ij v_j

    a_i is where the head is expected to stand for query i, a_{-1} the first place; it sums to one less what walked off
    the end. The sum over k is a recurrence along j, doubled up in log2 m steps: exact, where division by cumulative
    products is not. hard: p rounded to 0 or 1, the choice made when streaming; no gradient reaches the scores then.
    In training, noise: deviation of Gaussian noise added to the logits, so that p comes near 0 or 1; head_drop: each
    head is left out with this probability and the others scaled up, so that no few heads do all the work.
    State: a_i, of the size of the context. r starts at `offset`.
    Source: Raffel et al., arXiv:1704.00784; heads: Ma et al., arXiv:1909.12406, of whose two forms this is the hard one
    (MMA-H), offset and noise as in its code. Zhao et al., arXiv:2209.15176, name such attention with a regulariser of
    heads, without code; head_drop is that of Inaguma et al., arXiv:2005.09394.
    """

    card = Card(
        name="monotonic",
        title="Monotonic Multihead Attention (Adaptive Sparse and Monotonic Attention for ASR)",
        reference="arXiv:1909.12406",
        family=Family.SCORING,
        patterns={"causal-cross"},
        time="n^2 log n",
        state="1",
        notes="queries are visited one after another",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        hard: bool = False,
        offset: float = -2.0,
        noise: float = 1.0,
        head_drop: float = 0.0,
        causal: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        if noise < 0 or not 0 <= head_drop < 1:
            raise ValueError(f"monotonic: noise={noise}, head_drop={head_drop}; want noise >= 0 and 0 <= head_drop < 1")
        self.hard, self.noise, self.head_drop = hard, noise, head_drop
        self.offset = nn.Parameter(torch.tensor(float(offset)))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k, v, where = self._read(x, context, call)
        logits = grouped_scores(q * self.scale, k) + self.offset
        if self.training and self.noise and not self.hard:
            logits = logits + self.noise * torch.randn_like(logits)
        held = {} if call.state is None else call.state.fixed
        stops = stop_logits(widen(logits), where.allowed(), hard=self.hard)
        alignment = expected_alignment(stops, held.get("alignment"))
        held["alignment"] = alignment[:, :, -1].clone()
        weights = self._drop_heads(alignment.to(v.dtype))
        mixed = self.offered(q, k, v, grouped_mix(weights, v), weights, where)
        output, losses = self.output(mixed, x, call)
        return Result(output, weights if call.need_weights else None, losses)

    def _drop_heads(self, weights: Tensor) -> Tensor:
        if not self.training or self.head_drop == 0:
            return weights
        kept = (torch.rand(self.heads, device=weights.device) >= self.head_drop).to(weights.dtype)
        return weights * (kept * self.heads / kept.sum().clamp(min=1))[:, None, None]


def stop_logits(logits: Tensor, allowed: Tensor | None, *, hard: bool) -> Tensor:
    """Logits of p; where nothing may be attended to a head never stops, and decisions that are hard have -+infinity."""
    if hard:
        logits = torch.where(logits.isnan(), logits, torch.where(logits > 0, torch.inf, -torch.inf))
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)


def expected_alignment(logits: Tensor, before: Tensor | None = None) -> Tensor:
    """logits [b, h, n, m] of stopping, before [b, h, m] of the query that came before -> [b, h, n, m]."""
    m = logits.shape[-1]
    if before is None:
        before = (torch.arange(m, device=logits.device) == 0).to(logits.dtype).expand(*logits.shape[:2], m)
    # Not 1 - p, which is lost to rounding where a stop is almost sure.
    walks = F.pad((-logits).sigmoid()[..., :-1], (1, 0))
    rows = []
    for stop, walk in zip(logits.sigmoid().unbind(2), walks.unbind(2), strict=True):
        before = stop * _arrivals(walk, before)
        rows.append(before)
    return torch.stack(rows, 2)


def _arrivals(walk: Tensor, start: Tensor) -> Tensor:
    """r_j = walk_j r_(j - 1) + start_j over the last axis: the probability of coming to place j at all.

    After the step with `reach`, r holds what started at most 2 reach - 1 places before, and walk is a product of as
    many chances: sums and products of probabilities, which nothing divides.
    """
    m, reach = start.shape[-1], 1
    while reach < m:
        start = start + walk * F.pad(start[..., :-reach], (reach, 0))
        walk = walk * F.pad(walk[..., :-reach], (reach, 0))
        reach *= 2
    return start
