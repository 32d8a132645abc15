"""What it costs to spread one layer's attention over processes, by scheme: bytes sent, bytes held, FLOPs.

Distributed attention as one template, of which schemes differ in what they exchange, follows arXiv:2302.06218; its own
scheme, all keys and values gathered in every process, is `ring` with no less sent and P times the keys held.
b rows, n tokens, h query heads, g key/value heads, d and e features of keys and of values, P processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.functional.linear import CHUNK
from manyheads.mechanism import Call
from manyheads.parallel.blocks import TILE
from manyheads.parallel.halo import parts_before
from manyheads.parallel.layout import Kind, Layout
from manyheads.parallel.ring import UNDERWAY
from manyheads.parallel.wire import Place
from manyheads.registry import create_attention, list_attentions, mechanism_class

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


class Imagined(Layout):
    """The layout of a process that need not be there."""

    def __init__(self, length: int, kind: Kind, rank: int, size: int) -> None:
        super().__init__(length, kind)
        object.__setattr__(self, "at", Place(rank, size, None))

    @property
    def place(self) -> Place:
        at: Place = self.__dict__["at"]
        return at


@dataclass(frozen=True)
class Shape:
    """One attention over the sequence: its widths; bytes of a number. windows: of each head, or None. features, width:
    of the memory of a linear one, or None. rows: (count, width) of what a convolution reads before its own tokens, or a
    linear one beside its memory. moments: numbers of each row of the batch that are summed up before that memory is;
    more: numbers of further memories, which are sent back and forth as it is."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    item: int
    windows: tuple[int, ...] | None = None
    memory: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None
    moments: int = 0
    more: int = 0

    @property
    def wide(self) -> int:
        """Bytes of a number of a sum."""
        return max(4, self.item)


@dataclass(frozen=True)
class Cost:
    """Of the busiest process. sent: bytes forward, and backward. peak: bytes at the worst moment of a forward and
    backward pass over one layer, q, k and v among them. kept: bytes of that between the two passes, which each further
    layer adds. flops: of the scores and what they weigh, both passes; busiest: that over the mean of all processes."""

    scheme: str
    layout: Kind
    sent_forward: int
    sent_backward: int
    peak: int
    kept: int
    flops: float
    busiest: float


def costs(shape: Shape, processes: int) -> list[Cost]:
    """Every scheme that this attention has over so many processes; in one process it is the same without traffic."""
    if shape.length < processes:
        raise ValueError(f"plan: {shape.length} tokens for {processes} processes; want one for each at least")
    if shape.memory is not None:
        return [_cost(shape, processes, "state", "contiguous")]
    if shape.rows is not None:
        return [_cost(shape, processes, "halo", "contiguous")]
    found = [_cost(shape, processes, "ring", "zigzag")]
    if shape.windows is not None:
        found.insert(0, _cost(shape, processes, "halo", "contiguous"))
        return found if len(set(shape.windows)) == 1 else found[:1]
    if shape.kv_heads % processes == 0:
        found.append(_cost(shape, processes, "heads", "zigzag"))
    return found


def _cost(shape: Shape, processes: int, scheme: str, kind: Kind) -> Cost:
    layouts = [Imagined(shape.length, kind, rank, processes) for rank in range(processes)]
    sent = [SENT[scheme](shape, layout) for layout in layouts]
    work = [_flops(shape, layout, scheme) for layout in layouts]
    kept, peak = HELD[scheme](shape, max(layout.count() for layout in layouts), processes)
    most = max(sent, key=sum)
    return Cost(scheme, kind, *most, peak, kept, max(work), max(work) * processes / sum(work))


# -- bytes sent: exact, as `wire.traffic` counts them ------------------------------------------------------------------


def sent_ring(shape: Shape, layout: Layout) -> tuple[int, int]:
    at = layout.place
    numbers = shape.batch * shape.kv_heads * (shape.key_dim + shape.value_dim)
    # Every shard but the next process's, which it keeps as the last that comes.
    passed = layout.length - layout.count((at.rank + 1) % at.size) if at.size > 1 else 0
    home = layout.length if at.size > 1 else 0
    return numbers * shape.item * passed, numbers * (shape.item * passed + shape.wide * home)


def sent_heads(shape: Shape, layout: Layout) -> tuple[int, int]:
    size, mine = layout.place.size, layout.count()
    read = shape.heads * shape.key_dim + shape.kv_heads * (shape.key_dim + shape.value_dim)
    given = shape.heads * shape.value_dim

    # Heads divide: the sum over them is whole.
    away, back = mine * (size - 1), layout.length - mine
    each = shape.batch * shape.item
    return each * (read * away + given * back) // size, each * (given * away + read * back) // size


def sent_state(shape: Shape, layout: Layout) -> tuple[int, int]:
    assert shape.memory is not None
    (features, width), others = shape.memory, layout.place.size - 1
    once = others * shape.batch * (shape.heads * features * width + shape.more) * shape.wide
    counted = others * shape.batch * shape.moments * shape.wide
    near = (0, 0) if shape.rows is None else sent_halo(replace(shape, item=shape.wide), layout)
    return once + counted + near[0], once + near[1]


def sent_halo(shape: Shape, layout: Layout) -> tuple[int, int]:
    count, width = _halo(shape)
    going, coming = parts_before(layout.place.rank, count, layout)
    row = shape.batch * width * shape.item
    forward, backward = (sum(part.stop - part.start for part in parts.values()) for parts in (going, coming))
    return row * forward, row * backward


def _halo(shape: Shape) -> tuple[int, int]:
    if shape.rows is not None:
        return shape.rows
    assert shape.windows is not None
    return max(shape.windows) - 1, shape.kv_heads * (shape.key_dim + shape.value_dim)


SENT = {"ring": sent_ring, "heads": sent_heads, "state": sent_state, "halo": sent_halo}


# -- bytes held: estimates, whose error benchmarks/parallel.py measures ------------------------------------------------


def _parts(shape: Shape, tokens: int) -> tuple[int, int, int, int]:
    """Numbers in q, in k and v, in the result, and in one of each query."""
    rows = shape.batch * shape.heads * tokens
    pairs = shape.batch * shape.kv_heads * tokens * (shape.key_dim + shape.value_dim)
    return rows * shape.key_dim, pairs, rows * shape.value_dim, rows


def held_ring(shape: Shape, tokens: int, processes: int) -> tuple[int, int]:
    # A zigzag shard is two pieces, of which no tile has more than one; of the key heads some are under way.
    piece = tokens if processes == 1 else -(-tokens // 2)
    each = shape.batch * tokens * (shape.key_dim + shape.value_dim) * shape.item
    some = min(shape.kv_heads, max(1, UNDERWAY // each)) if processes > 1 else shape.kv_heads
    rows = shape.batch * shape.heads * some // shape.kv_heads
    return _held_pairs(shape, tokens, some if processes > 1 else 0, _tiles(rows, piece, shape.wide))


def _tiles(rows: int, piece: int, wide: int) -> int:
    """Scores, weights, their gradient, and what it is made of."""
    return int(4 * rows * min(TILE, piece) ** 2 * wide)


def _held_pairs(shape: Shape, tokens: int, travelling: int, tiles: int) -> tuple[int, int]:
    """travelling: key heads that go round at once, none in one process."""
    q, kv, out, each = _parts(shape, tokens)
    s, w = shape.item, shape.wide
    # In float32 and wider the sums that backward needs are the result itself.
    kept = (q + kv + out) * s + each * w + (out * w if s < w else 0)
    going = kv * travelling // shape.kv_heads
    homing = 3 * going * w if travelling else 0
    widened = (out + q) * w if s < w else 0
    # The gradient of q once more, as it is handed over.
    backward = widened + (2 * q + kv + 2 * each) * w + 3 * going * s + homing + tiles
    return kept, kept + backward


def held_heads(shape: Shape, tokens: int, processes: int) -> tuple[int, int]:
    """As many numbers as a process's tokens have, of all tokens of some heads; and the copies of an exchange."""
    q, kv, out, _ = _parts(shape, tokens)
    tiles = _tiles(shape.batch * shape.heads // processes, shape.length, shape.wide)
    kept, peak = _held_pairs(shape, tokens, 0, tiles)
    copied = (q + kv + out) * shape.item if processes > 1 else 0
    return kept + copied, peak + copied


def held_state(shape: Shape, tokens: int, processes: int) -> tuple[int, int]:
    """Chunks of the matrix are kept for the backward pass, and the features of queries and keys where they are made."""
    assert shape.memory is not None
    features, width = shape.memory
    q, kv, out, each = _parts(shape, tokens)
    # Features that are made, and what becomes of scores of a kernel other than their own product.
    made = features if features > shape.key_dim else 0
    matrices = CHUNK * (2 if made else 1)
    values = width if width > shape.value_dim else 0
    memories = shape.batch * shape.heads * features * width * (-(-tokens // CHUNK) + 2 * processes)
    kept = (q + kv + out) * shape.item + (each * (matrices + 2 * made + values) + memories) * shape.wide
    return kept, kept + (q + kv) * shape.wide


def held_halo(shape: Shape, tokens: int, processes: int) -> tuple[int, int]:
    q, kv, out, each = _parts(shape, tokens)
    count, width = _halo(shape)
    joined = shape.batch * count * width
    inputs = (q + kv + out) * shape.item
    if shape.windows is None:
        return inputs, inputs + 2 * (inputs + joined * shape.item)
    # The matrix of each block of queries, as wide as its window and itself.
    reach = sum(min(w, tokens + count) + min(max(w, 16), 64) for w in shape.windows) // len(shape.windows)
    kept = inputs + (kv + joined) * shape.item + each * reach * shape.item
    return kept, kept + (q + kv) * shape.item


HELD = {"ring": held_ring, "heads": held_heads, "state": held_state, "halo": held_halo}


# -- work --------------------------------------------------------------------------------------------------------------


def _flops(shape: Shape, layout: Layout, scheme: str) -> float:
    """Of one process: forward two products of each pair; backward five, the scores once more among them, in a ring, and
    four where autograd kept them."""
    d, e, rows = shape.key_dim, shape.value_dim, shape.batch * shape.heads
    mine = layout.count()
    if shape.rows is not None and shape.memory is None:
        return 6.0 * shape.batch * mine * (shape.rows[0] + 1) * shape.rows[1]
    if shape.memory is not None:
        features, width = shape.memory
        return 6.0 * rows * mine * (CHUNK * (d + width) + 3 * features * width)
    if scheme == "heads":
        pairs = shape.length * (shape.length + 1) / 2 / layout.place.size
    else:
        pairs = float(sum(_seen(piece.first, piece.size, shape.windows) for piece in layout.pieces()))
    return rows * pairs * (2.0 * (4 * d + 3 * e) if scheme != "halo" else 6.0 * (d + e))


def _seen(first: int, size: int, windows: tuple[int, ...] | None) -> float:
    """Pairs of queries first .. first + size - 1 and what they see; the mean over heads."""

    def up_to(end: int, window: int) -> float:
        ramp = min(end, window)
        return ramp * (ramp + 1) / 2 + (end - ramp) * window

    reach = windows or (first + size,)
    return sum(up_to(first + size, w) - up_to(first, w) for w in reach) / len(reach)


# -- what a mechanism exchanges ----------------------------------------------------------------------------------------


class _Asked:
    """Stands in for the other processes, and notes what a pass asks of them."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.moments, self.memories = 0, list[int]()

    def sums(self, x: Tensor, *, causal: bool) -> Tensor:
        self.moments += x[0].numel()
        return torch.empty_like(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, windows: Sequence[int] | None) -> Tensor:
        widths = {"heads": q.shape[1], "kv_heads": k.shape[1], "key_dim": k.shape[-1], "value_dim": v.shape[-1]}
        self.found.append(widths | {"windows": None if windows is None else tuple(windows)})
        return q.new_empty((*q.shape[:-1], v.shape[-1]))

    def recall(self, q: Tensor, k: Tensor, v: Tensor, kernel: Any, *, causal: bool, slopes: Tensor | None) -> Tensor:
        heads, width = q.shape[1], v.shape[-1]
        memory = (kernel.features(kernel.key(k)).shape[-1], width + (kernel.floor is not None))
        widths = {"heads": heads, "kv_heads": heads, "key_dim": k.shape[-1], "value_dim": width}
        self.found.append(widths | {"memory": memory})
        self.memories.append(heads * memory[0] * memory[1])
        return q.new_empty((*q.shape[:-1], width))

    def before(self, x: Tensor, count: int) -> Tensor:
        rows = (count, x[0, 0].numel())
        self.found.append({"heads": 1, "kv_heads": 1, "key_dim": rows[1], "value_dim": rows[1], "rows": rows})
        return x.new_empty((x.shape[0], count, *x.shape[2:]))


def shape_of(
    name: str,
    *,
    length: int,
    width: int,
    heads: int,
    batch: int = 1,
    dtype: str = "bfloat16",
    config: Mapping[str, Any] | None = None,
) -> Shape:
    """What a mechanism of this size asks of other processes, found by a pass over one token that has no numbers."""
    card = mechanism_class(name).card
    if card.parallel is None or Pattern.CAUSAL_SELF not in card.patterns:
        known = [n for n in list_attentions() if mechanism_class(n).card.parallel]
        raise ValueError(f"plan: {name} cannot be spread over processes; these can: {', '.join(known)}")
    if dtype not in DTYPES:
        raise ValueError(f"plan: dtype={dtype!r} was given; want one of {list(DTYPES)}")
    for what, value in (("length", length), ("width", width), ("heads", heads), ("batch", batch)):
        if value < 1:
            raise ValueError(f"plan: {what}={value} was given; want 1 or more")
    asked = _Asked()
    with torch.device("meta"), torch.no_grad():
        mechanism = create_attention(name, width, heads, **{**(config or {}), "causal": True})
        mechanism.attend(torch.empty(1, 1, width), None, Call(Pattern.CAUSAL_SELF, across=asked))
    found: dict[str, Any] = {}
    # Widths are those of the largest memory; what is read beside it has only its own.
    for part in sorted(asked.found, key=lambda part: math.prod(part.get("memory") or (0,))):
        found |= part
    if asked.moments and "memory" not in found:
        raise ValueError(f"plan: {name} sums up moments and no memory, which is not planned here")
    more = sum(asked.memories) - max(asked.memories, default=0)
    return Shape(batch=batch, length=length, item=DTYPES[dtype], moments=asked.moments, more=more, **found)
