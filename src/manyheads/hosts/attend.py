"""Softmax attention of packed queries: the query heads of a group read their one key head, which is never repeated.

Legend: b batch, g KV heads, r query heads on each, n queries, m keys, d head dim. Queries are [b, g, r, n, d],
keys and values [b, g, m, d]. No [n, m] tensor of a whole pass is made: where a mask or a score is needed it is made for
a block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Scores of one block of queries: 2^24 float32 numbers are 64 MiB.
BLOCK_SCORES = 2**24

# Scores that stay in a core's own cache while they are summed up.
CACHED_SCORES = 2**20

# Rows of queries -> what they may see: [b or 1, g or 1, rows, m], bool (True = may attend) or added to the scores; None
# where they may see everything.
Mask = Callable[[slice], Tensor | None]


@dataclass(frozen=True)
class Scoring:
    """What a layer does to its scores: scale, then a soft cap; and the sink logits [h] that join the softmax."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def pack(query: Tensor, kv_heads: int) -> Tensor:
    """[b, h, n, d] -> [b, g, r, n, d]; query head i reads KV head i // r."""
    b, h, n, d = query.shape
    return query.reshape(b, kv_heads, h // kv_heads, n, d)


def query_blocks(queries: Tensor, keys: int) -> Iterator[slice]:
    """Slices of the queries [b, g, r, n, d] whose scores against so many keys stay small."""
    b, g, r, n, _ = queries.shape
    step = max(1, min(n, BLOCK_SCORES // max(1, b * g * r * keys)))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The first pass: as many keys as queries, each seeing itself and what stands before. [b, g, r, n, dv]."""
    if queries.shape[2] == 1:
        out = scaled_dot_product_attention(queries[:, :, 0], keys, values, is_causal=True, scale=scale)
        return out.unsqueeze(2)
    each = [
        scaled_dot_product_attention(queries[:, :, i], keys, values, is_causal=True, scale=scale)
        for i in range(queries.shape[2])
    ]
    return torch.stack(each, 2)


def with_bias(seen: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask [b or 1, g or 1, rows, m] and what is added to the scores of every entry, bias [b, g, m]."""
    if bias is None:
        return seen
    added = bias.unsqueeze(2)
    if seen is None:
        return added
    return added.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else seen + added


def masked_attention(queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, mask: Mask) -> Tensor:
    """Any mask; [b, g, r, n, dv]. A query that may see nothing gets zeros."""
    if queries.shape[3] == 1:
        return one_query(queries, keys, values, scoring, mask(slice(0, 1)))[0]
    blocks = [
        _block(queries[:, :, :, rows], keys, values, scoring, mask(rows))
        for rows in query_blocks(queries, keys.shape[2])
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 3)


def lies_by_feature(rows: Tensor) -> bool:
    """Whether keys or values [b, g, m, d] are held with the entries of one feature side by side: two plain products
    then read them faster than PyTorch's kernel for one query does (1.2 to 1.6 times on a CPU in float32). Narrower
    types would round the scores, and other devices' kernels want rows."""
    return rows.dim() == 4 and rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64)


def one_query(
    queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, seen: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Decoding: the r heads of a group stand in line as r queries of one head. The output [b, g, r, 1, dv], and the
    weights [b, g, r, 1, m], or [b * g, r, m], where they were made on the way."""
    if scoring.plain and seen is None and lies_by_feature(keys):
        return two_products(queries, keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1), scoring.scale)
    line = queries.select(3, 0)
    if scoring.plain and not lies_by_feature(keys):
        if seen is not None:
            seen = seen.expand(-1, -1, line.shape[2], -1)
            seen = seen if seen.dtype == torch.bool else seen.to(line.dtype)
        out = scaled_dot_product_attention(line, keys, values, attn_mask=seen, scale=scoring.scale)
        return out.unsqueeze(3), None
    weights = probabilities(queries, keys, scoring, seen).select(3, 0)
    mixed = torch.matmul(weights if weights.dtype == values.dtype else weights.to(values.dtype), values)
    return mixed.unsqueeze(3), weights.unsqueeze(3)


def two_products(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Single queries [b, g, r, 1, d] to keys [b * g, d, m] and values [b * g, m, dv]: all of them, or under a mask
    [b * g, r, m] that is added and hides no row altogether. Output [b, g, r, 1, dv] and weights [b * g, r, m].

    In as few operations as there are: between the layers of a model that decodes, with its weights passing through the
    core's cache, each costs more than its numbers do."""
    b, g, r, _, d = queries.shape
    # Something to add, times nothing: for the sake of alpha, which scales within the product.
    start, beta = (queries.new_empty(()), 0) if added is None else (added, 1)
    scores = torch.baddbmm(start, queries.reshape(b * g, r, d), keys, beta=beta, alpha=scale)
    weights = scores.softmax(-1)
    return torch.bmm(weights, values).view(b, g, r, 1, -1), weights


def _block(queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, seen: Tensor | None) -> Tensor:
    if scoring.plain:
        if seen is not None and seen.dtype != torch.bool:
            seen = seen.to(queries.dtype)
        each = [
            scaled_dot_product_attention(queries[:, :, i], keys, values, attn_mask=seen, scale=scoring.scale)
            for i in range(queries.shape[2])
        ]
        return torch.stack(each, 2)
    weights = probabilities(queries, keys, scoring, seen).to(values.dtype)
    b, g, r, n, m = weights.shape
    return (weights.reshape(b, g, r * n, m) @ values).view(b, g, r, n, -1)


def probabilities(queries: Tensor, keys: Tensor, scoring: Scoring, seen: Tensor | None) -> Tensor:
    """softmax(cap(q k^T scale)), float32 at least, [b, g, r, n, m]; less the sinks' share, zeros for blind queries."""
    scores = masked_scores(queries, keys, scoring, seen)
    g, r = queries.shape[1:3]
    top = scores.amax(-1, keepdim=True)
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(scores.dtype).view(1, g, r, 1, 1)
        top = torch.maximum(top, sinks)
    top = top.clamp_min(torch.finfo(top.dtype).min)
    scores = (scores - top).exp_()
    total = scores.sum(-1, keepdim=True)
    if scoring.sinks is not None:
        total = total + (sinks - top).exp()
    return scores / total.clamp_min(torch.finfo(total.dtype).tiny)


def weigh(scores: Tensor, seen: Tensor | None, sinks: Tensor | None = None) -> Tensor:
    """softmax of scores [b, h, n, m] under a mask [b or 1, 1 or h, n, m] (bool, or added), beside sinks [h]; zeros for
    blind queries. For training: nothing is written in place, and a blind query's gradient is zero, not NaN."""
    if seen is not None and seen.dtype == torch.bool:
        scores = scores.masked_fill(~seen, -torch.inf)
    elif seen is not None:
        scores = (scores + seen).masked_fill(hides(seen), -torch.inf)
    blind = scores.detach().amax(-1, keepdim=True) == -torch.inf
    scores = scores.masked_fill(blind, 0.0)
    if sinks is None:
        return scores.softmax(-1).masked_fill(blind, 0.0)
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1].masked_fill(blind, 0.0)


def hides(added: Tensor) -> Tensor:
    """Where a mask that is added to the scores says "nothing": with the lowest number of its type, which is not yet
    minus infinity, or with one that a bias has moved a little."""
    return added <= torch.finfo(added.dtype).min / 2


def masked_scores(queries: Tensor, keys: Tensor, scoring: Scoring, seen: Tensor | None) -> Tensor:
    """cap(q k^T scale), float32 at least, [b, g, r, n, m], minus infinity where nothing is seen."""
    b, g, r, n, d = queries.shape
    scores = queries.reshape(b, g, r * n, d) @ keys.transpose(2, 3)
    scores = scores.view(b, g, r, n, -1) * scoring.scale
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if seen is not None:
        seen = seen.unsqueeze(2)
        if seen.dtype == torch.bool:
            scores = scores.masked_fill(~seen, -torch.inf)
        else:
            scores = (scores + seen).masked_fill(hides(seen), -torch.inf)
    return scores


def received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that every key gets, summed over queries and query heads, [b, g, m] float32 at least, where query i
    sees the keys up to m - n + i. Blocks of one KV head at a time on a CPU, whose cache they then fit; scores above the
    diagonal's block are never computed."""
    b, g, r, n, d = queries.shape
    m, together = keys.shape[2], queries.device.type != "cpu"
    before, step = m - n, max(1, min(n, (BLOCK_SCORES if together else CACHED_SCORES) // (r * m)))
    lines = queries.reshape(1 if together else b * g, -1, r, n, d) * scale
    keys = keys.reshape(*lines.shape[:2], m, d)
    out = torch.zeros(*lines.shape[:2], m, device=keys.device, dtype=torch.promote_types(keys.dtype, torch.float32))
    ahead = torch.full((step, step), -torch.inf, device=keys.device, dtype=keys.dtype).triu(1)
    for line, key, total in zip(lines, keys, out, strict=True):
        for start in range(0, n, step):
            rows, end = min(step, n - start), min(n, start + step) + before
            scores = line[:, :, start : start + rows].flatten(1, 2) @ key[:, :end].transpose(1, 2)
            scores.unflatten(1, (r, rows))[..., end - rows :] += ahead[:rows, :rows]
            weights = scores.softmax(-1, dtype=out.dtype)
            # As a product: summing a matrix's columns any other way reads it slower than the scores were made.
            total[:, :end] += (weights.new_ones(len(weights), 1, r * rows) @ weights)[:, 0]
    return out.view(b, g, m)
