"""The best k tokens so far, by a score that does not depend on the query: what a head holds while a sequence passes.

b batch, h heads, c tokens of a chunk, k slots, d head dim. Equal scores: the earlier token wins, or the newer one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Tokens whose masks are built at once.
CHUNK = 64


class Held(NamedTuple):
    """Tokens, oldest first: keys and values [b, h, k, d], scores [b, h, k], -inf for none (a free slot, padding), and
    places in the sequence [b, h, k]."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    places: Tensor


def nothing_held(like: Tensor, scores: Tensor, k: int) -> Held:
    """k free slots for keys and values like `like` [b, h, n, d]."""
    rows = like.new_zeros(*like.shape[:2], k, like.shape[-1])
    free = scores.new_full(rows.shape[:3], -torch.inf)
    return Held(rows, rows, free, torch.zeros_like(free, dtype=torch.long))


def running_top(held: Held, new: Held, *, newest: bool = False) -> tuple[Held, Tensor]:
    """The tokens held and a chunk of c new ones, [b, h, k + c], and which of them are the best k when each new token
    has come, itself among them: [b, h, c, k + c]."""
    both = Held(*(torch.cat(pair, 2) for pair in zip(held, new, strict=True)))
    k, score = held.scores.shape[2], both.scores.detach()
    order = torch.arange(score.shape[2], device=score.device)
    # What is not held had k better ones, and so has whatever it beats: counting among these is counting among all.
    among_held = _ranks(score[:, :, :k], newest)
    later, earlier = score[:, :, k:, None], score[:, :, None]
    first = order[k:, None] > order if newest else order[k:, None] < order
    beats = (later > earlier) | ((later == earlier) & first)  # a new token and any token [b, h, c, k + c]
    rank = beats.int().cumsum(2)
    rank[..., :k] += among_held[:, :, None]
    rank[..., k:] += k - beats[..., :k].sum(3)[:, :, None]
    return both, (rank < k) & (order <= order[k:, None]) & (score != -torch.inf)[..., None, :]


def _ranks(score: Tensor, newest: bool) -> Tensor:
    """[b, h, k] -> how many beat each one."""
    if newest:
        return _ranks(score.flip(2), False).flip(2)
    order = score.argsort(dim=2, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        2, order, torch.arange(score.shape[2], device=score.device).expand_as(order)
    )


def after_chunk(both: Held, inside: Tensor, k: int) -> Held:
    """What is held after the chunk, of what running_top gave."""
    out, index = (~inside[:, :, -1]).int().sort(dim=-1, stable=True)
    index, free = index[..., :k], out[..., :k] > 0
    rows = index[..., None].expand(-1, -1, -1, both.keys.shape[-1])
    scores = both.scores.gather(2, index).masked_fill(free, -torch.inf)
    return Held(both.keys.gather(2, rows), both.values.gather(2, rows), scores, both.places.gather(2, index))
