"""What every process of a group holds of the planner: the bytes that it foretells are those that go over the wire."""

import functools

import torch
import torch.distributed as dist
from ring_cases import drawn

from manyheads.functional.linear import Kernel
from manyheads.parallel import (
    Layout,
    heads_attention,
    ring_attention,
    sequence_parallel,
    state_attention,
    tokens_before,
    traffic,
    windowed_attention,
)
from manyheads.parallel.plan import SENT, Imagined, Shape, costs, shape_of

B, N, D, E = 2, 37, 4, 6


def exact(scheme: str, kind: str, shape: Shape, call, dtype: torch.dtype = torch.float32) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if scheme == "heads" and shape.kv_heads % size:
        assert scheme not in {cost.scheme for cost in costs(shape, size)}
        return
    layout = Layout(N, kind)
    sizes = ((shape.heads, shape.key_dim), (shape.kv_heads, shape.key_dim), (shape.kv_heads, shape.value_dim))
    drawing = (layout.shard(drawn(0, B, h, N, d, dtype=dtype), 2).requires_grad_() for h, d in sizes)
    q, k, v = drawing
    with traffic() as forward:
        out = call(q, k, v, layout)
    with traffic() as backward:
        out.sum().backward()
    told = SENT[scheme](shape, Imagined(N, kind, rank, size))
    assert (forward.bytes, backward.bytes) == told
    found = next(cost for cost in costs(shape, size) if cost.scheme == scheme)
    assert sum(told) <= found.sent_forward + found.sent_backward


def rows(q, k, v, layout):
    return tokens_before(q.transpose(1, 2).flatten(2), 5, layout)


def whole(name: str, wanted: tuple[object, ...], **config) -> None:
    """A whole model of one layer, which exchanges more than one thing, beside what is told of that layer."""
    from switch_cases import batch_of, ours

    rank, size = dist.get_rank(), dist.get_world_size()
    model, batch = ours({"name": name, **config}).float(), batch_of(N)
    with sequence_parallel(model) as spread:
        mine = spread.shard(batch)
        with traffic() as forward:
            loss = model(**mine).loss
        with traffic() as backward:
            loss.backward()
    shape = shape_of(name, length=N, width=16, heads=4, batch=2, dtype="float32", config=config)
    assert (shape.memory, shape.rows, shape.moments, shape.more) == wanted
    ahead = 6 * 8 * (size - 1)  # whose shard it is
    assert (forward.bytes - ahead, backward.bytes) == SENT["state"](shape, Imagined(N, "contiguous", rank, size))


PAIRS = Shape(B, N, 6, 6, D, E, 4)
GROUPED = Shape(B, N, 6, 2, D, E, 4)
NARROW = Shape(B, N, 6, 6, D, E, 2)
WINDOWS = Shape(B, N, 6, 6, D, E, 4, windows=(9,) * 6)
MEMORY = Shape(B, N, 6, 6, D, E, 4, memory=(D, E))
ROWS = Shape(B, N, 6, 6, D, E, 4, rows=(5, 6 * D))
causal = functools.partial(ring_attention, causal=True)

CASES = {
    "ring": lambda: exact("ring", "zigzag", PAIRS, causal),
    "ring, grouped": lambda: exact("ring", "zigzag", GROUPED, causal),
    "ring, bfloat16": lambda: exact("ring", "zigzag", NARROW, causal, torch.bfloat16),
    "heads": lambda: exact("heads", "zigzag", PAIRS, functools.partial(heads_attention, causal=True)),
    "heads, bfloat16": lambda: exact(
        "heads", "zigzag", NARROW, functools.partial(heads_attention, causal=True), torch.bfloat16
    ),
    "state": lambda: exact(
        "state", "contiguous", MEMORY, functools.partial(state_attention, kernel=Kernel(floor=None), causal=True)
    ),
    "state, moments and a block": lambda: whole("lln", ((4, 5), (4, 33), 6, 0), block=5),
    "state, several": lambda: whole("flow", ((4, 4), None, 1, 4 * (4 * 4 + 1))),
    "halo": lambda: exact("halo", "contiguous", WINDOWS, functools.partial(windowed_attention, windows=[9] * 6)),
    "rows": lambda: exact("halo", "contiguous", ROWS, rows),
}
