"""Landmark attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.blocks import block_ids
from manyheads.functional.grouped import MASK_ROWS, grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where

# Queries whose retrieved blocks are gathered at once.
ROWS = 32


@register
class Landmark(SoftmaxAttention):
    """The last token of each block is its landmark: attending to it opens the block.

        G_i = the tokens j <= i of i's own block that are no landmark, and the landmarks l_B of earlier blocks B
        p = softmax over G_i of (q_i . k_j / sqrt(d));  s^B = softmax of the same over B without l_B
        weight of j: p_j in i's own block, p_(l_B) s^B_j in an earlier block B, zero for landmarks

    block: tokens per block, its landmark among them: the caller puts landmark tokens at the positions block - 1,
    2 block - 1, .. top_k: only the top_k earlier blocks whose landmarks score highest are opened, per query and head
    (the paper's retrieval, which it uses at inference); None opens all. Decoding reads landmarks and the blocks opened.

    Source: arXiv:2305.16300 and its released code, whose landmark, as a query, does not see itself either. There
    retrieved blocks get new, nearer rotary positions; here every token keeps its own.
    """

    shares_kv = False
    card = Card(
        name="landmark",
        title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
        reference="arXiv:2305.16300",
        family=Family.SELECTION,
        patterns={"causal-self"},
        time="n^2 / block + n block top_k",
        state="n",
        example={"block": 4, "top_k": 2},
        notes="Landmark tokens are the caller's to insert. With top_k=None it costs n^2. Equal landmark scores, as of "
        "one landmark token without positions, are settled by rounding.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        block: int = 64,
        top_k: int | None = None,
        causal: bool = True,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        if block < 2 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"{self.card.name}: block={block}, top_k={top_k}; want a block of at least one token and its landmark, "
                "and a positive top_k or None"
            )
        self.block, self.top_k = block, top_k

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k, v, where = self._read(x, context, call)
        usual = call.dense is None and where.usual
        retrieves = usual and self.top_k is not None and not call.need_weights
        step, parts, weights = ROWS if retrieves else MASK_ROWS, [], []
        for start in range(0, q.shape[2], step):
            rows = slice(start, start + step)
            if retrieves:
                parts.append(self._retrieved(q[:, :, rows], k, v, where.rows(rows)))
                continue
            weight = self._weights(q[:, :, rows], k, where.rows(rows))
            parts.append(grouped_mix(weight, v))
            if call.need_weights:
                weights.append(weight)
        whole = torch.cat(weights, 2) if weights else None
        mixed = self.offered(q, k, v, torch.cat(parts, 2), whole, where)
        output, losses = self.output(mixed, x, call)
        return Result(output, whole, losses)

    def _weights(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        scores = grouped_scores(q * self.scale, k)
        allowed = where.allowed()
        allowed = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand_as(scores)
        ids = block_ids(where.key_positions, self.block)
        blocks, own = int(ids[:, -1].max()) + 1, ids[:, where.i][:, None, :, None]
        mark = (where.key_positions % self.block == self.block - 1)[:, None, None]
        ids = ids[:, None, None]
        marks = allowed & mark & (ids < own)
        if self.top_k is not None:
            found = scores.detach().masked_fill(~marks, -torch.inf).topk(min(self.top_k, scores.shape[-1]), -1)
            marks = torch.zeros_like(marks).scatter(-1, found.indices, True) & marks
        gate = masked_softmax(scores, marks | (allowed & ~mark & (ids == own)))
        index = ids.expand_as(scores)
        inside = _softmax_in(scores, index, blocks, allowed & ~mark & (ids < own))
        share = torch.zeros_like(scores[..., :1].expand(*scores.shape[:3], blocks)).scatter_add(
            -1, index, gate.masked_fill(~mark, 0.0)
        )
        return gate.masked_fill(mark, 0.0) + inside * share.gather(-1, index)

    def _retrieved(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        """Reads the landmarks, the blocks opened, and the query's own block; q [b, h, r, d]."""
        (b, h, r, _), m, size = q.shape, k.shape[2], self.block
        assert self.top_k is not None
        q, own = q * self.scale, where.i // size
        score = grouped_scores(q, k[:, :, size - 1 :: size])
        past = (torch.arange(score.shape[-1], device=q.device) < own[:, None])[None, None]
        if where.padding is not None:
            past = past & where.padding[:, None, None, size - 1 :: size]
        index = score.masked_fill(~past, -torch.inf).topk(min(self.top_k, score.shape[-1]), -1).indices
        opened, marks = past.expand_as(score).gather(-1, index), score.gather(-1, index)
        blocks = torch.cat([index, own[:, None].expand(b, h, r, 1)], -1)
        tokens = blocks[..., None] * size + torch.arange(size - 1, device=q.device)
        seen = tokens <= where.i[:, None, None]
        tokens = tokens.clamp(max=m - 1)
        batch, heads = torch.arange(b, device=q.device).view(-1, 1, 1, 1, 1), torch.arange(h, device=q.device)
        if where.padding is not None:
            seen = seen & where.padding[batch, tokens]
        keys, values = (t[batch, heads.view(-1, 1, 1, 1), tokens] for t in (k, v))
        near = (keys @ q[..., None, :, None]).squeeze(-1)
        gate = masked_softmax(torch.cat([marks, near[..., -1, :]], -1), torch.cat([opened, seen[..., -1, :]], -1))
        inside = masked_softmax(near[..., :-1, :], seen[..., :-1, :]) * gate[..., : index.shape[-1], None]
        weights = torch.cat([inside.flatten(-2), gate[..., index.shape[-1] :]], -1)
        return (weights[..., None, :] @ values.flatten(-3, -2)).squeeze(-2)


def _softmax_in(scores: Tensor, index: Tensor, blocks: int, allowed: Tensor) -> Tensor:
    """Softmax within each block: scores, index, allowed [b, h, n, m]; zero where nothing of a block is allowed."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    low = torch.finfo(wide.dtype).min
    empty = wide.new_full((*wide.shape[:3], blocks), low)
    masked = wide.masked_fill(~allowed, low)
    most = empty.scatter_reduce(-1, index, masked.detach(), "amax").gather(-1, index)
    # A block of nothing has weights of one here, which the mask takes away.
    raised = (masked - most).exp().masked_fill(~allowed, 0.0)
    total = torch.zeros_like(empty).scatter_add(-1, index, raised).gather(-1, index)
    return (raised / total.masked_fill(total == 0, 1.0)).to(scores.dtype)
