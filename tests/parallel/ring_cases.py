"""What every process of a group holds of ring attention, against one process that has all tokens."""

import functools
import itertools
import random

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from manyheads.parallel import Layout, blocks, heads_attention, ring_attention, traffic

# What rounding what goes in and comes out leaves.
CLOSE = {
    torch.float64: {"rtol": 1e-7, "atol": 1e-7},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
}


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def allowed(b: int, n: int, *, causal: bool, window: int | None, padding: Tensor | None, documents: Tensor | None):
    """[b, 1, n, n], pair by pair."""
    found = torch.zeros(b, 1, n, n, dtype=torch.bool)
    for row, i, j in itertools.product(range(b), range(n), range(n)):
        sees = not causal or j <= i
        sees = sees and (window is None or i - j < window)
        sees = sees and (padding is None or bool(padding[row, j]))
        found[row, 0, i, j] = sees and (documents is None or bool(documents[row, i] == documents[row, j]))
    return found


def one_process(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    copies = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask, -1e30)
    weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return weights @ v


def equal(
    seed: int,
    n: int,
    *,
    kind: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    padded: bool = False,
    packed: bool = False,
    heads: tuple[int, int] = (4, 2),
    stretch: float = 1.0,
    again: bool = False,
    dtype: torch.dtype = torch.float64,
    scheme=ring_attention,
) -> None:
    draw, b, d, width = random.Random(seed), 2, 6, 4
    q, k = stretch * drawn(seed, b, heads[0], n, d), stretch * drawn(seed + 1, b, heads[1], n, d)
    v, gradient = drawn(seed + 2, b, heads[1], n, width), drawn(seed + 3, b, heads[0], n, width)
    q, k, v, gradient = (x.to(dtype) for x in (q, k, v, gradient))
    padding = torch.tensor([[draw.random() < 0.7 for _ in range(n)] for _ in range(b)]) if padded else None
    if padding is not None:
        padding[1] = False  # a row of which nothing is real
    documents = torch.tensor([[draw.randrange(3) for _ in range(n)] for _ in range(b)]) if packed else None
    scale = 0.3
    mask = allowed(b, n, causal=causal, window=window, padding=padding, documents=documents)
    # One process in float64, of what was rounded already.
    whole = [x.to(torch.float64, copy=True).requires_grad_() for x in (q, k, v)]
    wanted = one_process(*whole, mask, scale)
    wanted.backward(gradient.double())

    layout = Layout(n, kind)
    mine = [layout.shard(x, 2).requires_grad_() for x in (q, k, v)]
    options = {"causal": causal, "window": window, "scale": scale}
    options |= {"padding": None if padding is None else layout.shard(padding)}
    options |= {"documents": None if documents is None else layout.shard(documents)}
    call = functools.partial(scheme, layout=layout, **options)
    out = checkpoint(call, *mine, use_reentrant=False) if again else call(*mine)
    out.backward(layout.shard(gradient, 2))
    everyone = layout.whole(out, 2)
    # Only now: a process that stopped at a difference would leave the others waiting for it.
    assert {x.dtype for x in (out, *(x.grad for x in mine))} == {dtype}
    close = CLOSE[dtype]
    assert_close(out.double(), layout.shard(wanted, 2).detach(), **close)
    for found, expected in zip(mine, whole, strict=True):
        assert_close(found.grad.double(), layout.shard(expected.grad, 2), **close)
    assert_close(everyone.double(), wanted.detach(), **close)


def bytes_sent() -> None:
    """The formula of the docstring, in which only the lengths of the shards count."""
    layout, size, rank = Layout(24), dist.get_world_size(), dist.get_rank()
    q, k, v = (layout.shard(drawn(0, 1, 2, 24, 4, dtype=torch.float32), 2).requires_grad_() for _ in range(3))
    token = 2 * 2 * 4 * 4
    # All shards but the next process's go through here on their way forward.
    passed = sum(layout.count((rank - step) % size) for step in range(size - 1))
    with traffic() as forward:
        out = ring_attention(q, k, v, layout, causal=True)
    assert forward.bytes == token * passed
    with traffic() as backward:
        out.sum().backward()
    assert backward.bytes == token * (passed + (24 if size > 1 else 0))
    assert forward.bytes == token * passed


def balance() -> None:
    """Pairs that are computed: the same for all in a zigzag, within a tenth; in a row they are not."""
    size, rule, cpu = dist.get_world_size(), blocks.Rule(1.0, True, None), torch.device("cpu")

    def busiest(kind: str) -> float:
        layout = Layout(240, kind)
        work = []
        for rank in range(size):
            mine = blocks.Side(layout.pieces(rank), None)
            met = [blocks.tiles(mine, blocks.Side(layout.pieces(r), None), rule, cpu) for r in range(size)]
            spans = [(t.rows, t.columns) for tiles in met for t in tiles]
            work.append(sum((a.stop - a.start) * (b.stop - b.start) for a, b in spans))
        assert sum(work) <= 240 * (240 + blocks.TILE) / 2
        return max(work) / (sum(work) / size)

    assert busiest("zigzag") < 1.1
    assert size == 1 or busiest("contiguous") > 1.4


def narrow() -> None:
    """bfloat16 loses no more than by rounding what comes in and goes out: sums are float32."""
    n, layout = 64, Layout(64)
    q, k, v, gradient = (drawn(s, 1, 2, n, 8, dtype=torch.bfloat16) for s in range(4))
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    wanted = one_process(*whole, mask, 8**-0.5)
    wanted.backward(gradient.double())
    mine = [layout.shard(x, 2).requires_grad_() for x in (q, k, v)]
    out = ring_attention(*mine, layout, causal=True)
    assert out.dtype == torch.bfloat16
    out.backward(layout.shard(gradient, 2))
    for found, expected in [(out, wanted), *((a.grad, b.grad) for a, b in zip(mine, whole, strict=True))]:
        assert_close(found.double(), layout.shard(expected, 2).detach(), rtol=2**-8, atol=1e-5)


def under_autocast() -> None:
    """As torch's kernel has it: all in autocast's dtype (models hand it queries and keys that are wider than values),
    and from there on what it is without autocast."""
    n, layout = 64, Layout(64)
    q, k, v, gradient = (drawn(s, 1, 4, n, 8, dtype=torch.bfloat16) for s in range(4))
    for scheme in (ring_attention, *([heads_attention] if 4 % dist.get_world_size() == 0 else [])):
        found = []
        for on in (False, True):
            mine = [layout.shard(x, 2).requires_grad_() for x in (q, k, v)]
            wide = torch.float32 if on else torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                out = scheme(mine[0].to(wide), mine[1].to(wide), mine[2], layout, causal=True)
            out.backward(layout.shard(gradient, 2))
            found.append([out, *(x.grad for x in mine)])
        assert found[1][0].dtype == torch.bfloat16
        for alone, own in zip(*found, strict=True):
            assert_close(own, alone, rtol=0, atol=0)


def no_rows() -> None:
    """A batch of none, as the last of an epoch may be."""
    layout = Layout(12)
    x = layout.shard(torch.empty(0, 2, 12, 4), 2).requires_grad_()
    out = ring_attention(x, x, x, layout, causal=True)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 2, layout.count(), 4)


def two_groups() -> None:
    """A group of some processes beside that of all."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    x = drawn(0, 1, 2, 7, 4)
    mask = torch.ones(7, 7, dtype=torch.bool)[None, None]
    assert_close(ring_attention(x, x, x, Layout(7, group=alone)), one_process(x, x, x, mask, 0.5))
    both = Layout(7)
    mine = both.shard(x, 2)
    assert_close(ring_attention(mine, mine, mine, both), both.shard(one_process(x, x, x, mask, 0.5), 2))


CASES = {
    "causal": functools.partial(equal, 0, 37),
    "contiguous": functools.partial(equal, 10, 23, kind="contiguous", heads=(2, 2)),
    "all to all": functools.partial(equal, 20, 31, causal=False, heads=(4, 1)),
    "window": functools.partial(equal, 30, 41, window=7),
    "contiguous window": functools.partial(equal, 40, 29, window=1, kind="contiguous"),
    "padding": functools.partial(equal, 50, 26, padded=True),
    "padding all to all": functools.partial(equal, 60, 19, padded=True, causal=False),
    "documents": functools.partial(equal, 70, 33, packed=True),
    "documents and padding": functools.partial(equal, 80, 22, packed=True, padded=True, window=9),
    "one token": functools.partial(equal, 90, 1),
    "two tokens": functools.partial(equal, 100, 2, padded=True),
    "five tokens": functools.partial(equal, 110, 5, kind="contiguous", causal=False),
    "large scores": functools.partial(equal, 120, 24, stretch=30.0),
    "checkpointed": functools.partial(equal, 130, 21, again=True, packed=True),
    "bytes sent": bytes_sent,
    "balance": balance,
    "bfloat16": narrow,
    "autocast": under_autocast,
    "no rows": no_rows,
    "two groups": two_groups,
}
