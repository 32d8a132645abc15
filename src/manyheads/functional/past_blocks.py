"""A block of queries attends to itself, causally, and to a few blocks of the past that its first token picks.

b batch, h heads, n queries, m keys, d head dim, s tokens per block, c blocks, r picks. What picks block I is the mean
of all queries up to the first token of I, what stands for a block J is the sum of its tokens' running means of keys. A
pick is of the largest share of a softmax, and keys and values of the block come scaled by that share, so that it has a
gradient. Beside the blocks of the past there are r empty ones, s times a learned token, whose score is zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.grouped import masked_softmax

EMPTY, NONE = -1, -3  # for a picked block: a learned one, or none at all


class Picks(NamedTuple):
    """share and block [b, h, i, r]: what each of i blocks (or queries) picks; EMPTY for a learned block."""

    share: Tensor
    block: Tensor


class Rule(NamedTuple):
    """picks: r. temperature: of the softmax. empty_key, empty_value: [h, 1, d]. size: s. scale: of the scores."""

    picks: int
    temperature: float
    empty_key: Tensor
    empty_value: Tensor
    size: int
    scale: float


def running_mean(x: Tensor, counted: Tensor) -> Tensor:
    """x [b, h, n, d] -> the mean up to each token of those counted [b, h, n], zero before the first."""
    total = (x * counted[..., None]).cumsum(2)
    return total / counted.cumsum(2).clamp(min=1)[..., None]


def pick(first: Tensor, blocks: Tensor, past: Tensor, rule: Rule) -> Picks:
    """first [b, h, i, d], blocks [b, h, c, d], past (those that may be picked), broadcasting to [b, h, i, c]."""
    scores = first @ blocks.mT * first.shape[-1] ** -0.5
    scores = F.pad(scores.masked_fill(~past, -torch.inf), (rule.picks, 0)) / rule.temperature
    shares, chosen = [], []
    for _ in range(rule.picks):
        share, place = scores.softmax(-1).max(-1, keepdim=True)
        shares.append(share)
        chosen.append((place - rule.picks).clamp(min=EMPTY))
        scores = scores.scatter(-1, place, -torch.inf)
    return Picks(torch.cat(shares, -1), torch.cat(chosen, -1))


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """The whole rule for q, k, v [b, h, n, d], the first block beginning at the first token: time and memory n s r."""
    n = q.shape[2]
    if n == 0:
        return v
    every = torch.ones_like(q[..., 0], dtype=torch.bool)
    short = -n % rule.size
    firsts = running_mean(_wide(q), every)[:, :, :: rule.size]
    q, k, v, means = (_cut(t, short, rule.size) for t in (q, k, v, running_mean(_wide(k), every)))
    c = q.shape[2]
    past = torch.ones(c, c, dtype=torch.bool, device=q.device).tril(-1)
    picks = pick(firsts, means.sum(3), past, rule)
    keys, values = (
        torch.cat((_picked(t, empty, picks), t), 3) for t, empty in ((k, rule.empty_key), (v, rule.empty_value))
    )
    seen = torch.ones(rule.size, keys.shape[3], dtype=torch.bool, device=q.device)
    weights = masked_softmax(q * rule.scale @ keys.mT, seen.tril(rule.picks * rule.size))
    return (weights @ values).flatten(2, 3)[:, :, :n]


def attend_pairs(
    q: Tensor, k: Tensor, v: Tensor, own: Tensor, of_key: Tensor, picks: Picks, rule: Rule
) -> tuple[Tensor, Tensor]:
    """The same through the matrix: q [b, h, n, d], k and v [b, h, m, d], own [b, h, n, m] (keys of the query's block),
    of_key [b, h, m] (each key's block, negative for none), picks of every query. Mixed [b, h, n, d], and weights
    [b, h, n, m] over tokens, what empty blocks get not among them."""
    q = q * rule.scale
    scores, empty = q @ k.mT, q @ rule.empty_key.mT
    parts, allowed = [scores], [own]
    for r in range(rule.picks):
        share, block = picks.share[..., r, None].to(q.dtype), picks.block[..., r, None]
        parts += [share * scores, share * empty + math.log(rule.size)]
        allowed += [(block >= 0) & (block == of_key[:, :, None]), block == EMPTY]
    weights = masked_softmax(torch.cat(parts, -1), torch.cat(allowed, -1)).split([p.shape[-1] for p in parts], -1)
    over, mixed = weights[0], torch.zeros_like(q)
    for r in range(rule.picks):
        share = picks.share[..., r, None].to(q.dtype)
        over = over + share * weights[1 + 2 * r]
        mixed = mixed + share * weights[2 + 2 * r] * rule.empty_value
    return mixed + over @ v, over


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _cut(t: Tensor, short: int, size: int) -> Tensor:
    """[b, h, n, d] -> [b, h, c, s, d], zero behind the end."""
    return F.pad(t, (0, 0, 0, short)).unflatten(2, (-1, size))


def _picked(blocks: Tensor, empty: Tensor, picks: Picks) -> Tensor:
    """blocks [b, h, c, s, d] -> the picked ones in place of each, scaled: [b, h, c, r s, d]."""
    b, h, c, s, d = blocks.shape
    r = picks.block.shape[-1]
    both = torch.cat((empty[None, :, None].expand(b, -1, 1, s, -1).to(blocks.dtype), blocks), 2)
    index = (picks.block + 1).flatten(2)[..., None, None].expand(-1, -1, -1, s, d)
    found = both.gather(2, index).view(b, h, c, r, s, d) * picks.share[..., None, None].to(blocks.dtype)
    return found.flatten(3, 4)
