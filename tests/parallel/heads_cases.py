"""Attention by heads, against one process, as ring attention is."""

import functools

import pytest
import torch
import torch.distributed as dist
from ring_cases import drawn, equal

from manyheads.parallel import Layout, heads_attention, traffic


def bytes_sent() -> None:
    """All but the own share of q, k, v and the result."""
    layout, size = Layout(24), dist.get_world_size()
    q, k = (layout.shard(drawn(0, 1, heads, 24, 4, dtype=torch.float32), 2).requires_grad_() for heads in (12, 6))
    with traffic() as count:
        heads_attention(q, k, k, layout)
    mine = layout.count()
    away = (2 * 6 + 12) * mine * 4 * 4 * (size - 1) // size
    back = 12 // size * (24 - mine) * 4 * 4
    assert count.bytes == away + back


def refused() -> None:
    size, layout = dist.get_world_size(), Layout(9)
    x = layout.shard(drawn(0, 1, size + 1, 9, 4), 2)
    if size > 1:
        with pytest.raises(ValueError, match=f"{size + 1} key heads were given to {size} processes"):
            heads_attention(x, x, x, layout)


halves = functools.partial(equal, heads=(12, 6), scheme=heads_attention)

CASES = {
    "causal": functools.partial(halves, 0, 37),
    "contiguous": functools.partial(halves, 10, 23, kind="contiguous", window=4),
    "padding": functools.partial(halves, 20, 26, padded=True, causal=False),
    "documents": functools.partial(halves, 30, 19, packed=True),
    "two tokens": functools.partial(halves, 40, 2, padded=True, packed=True),
    "bytes sent": bytes_sent,
    "too few heads": refused,
}
