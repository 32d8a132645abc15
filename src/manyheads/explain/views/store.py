"""Attention to be looked at: one chunk of bytes per (layer, head), opened only when looked at (see chunks.py).

How many entries are kept adapts to a budget of megabytes in the page: before each chunk, k is what is left of the
budget, shared evenly by the rows to come, at what rows have cost so far. A matrix that fits is kept whole. Weights come
head by head in row blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyheads.hosts.positions import placed
from manyheads.hosts.sites import choose
from manyheads.hosts.taps import tap
from manyheads.mechanism import Mechanism

from .chunks import Rows, deflate, encode, open_chunk, pack

# A thumbnail has at most this many cells on a side.
THUMB = 32
# Base64 takes 4 characters for 3 bytes; scale, share and count take 6 bytes of a row.
BASE64, ROW_BYTES = 4 / 3, 6
CHUNK_MARKUP = 64
# A little is left over, since what a chunk will cost is known only by what those before it did.
SPARE = 0.98
# Gives the weights of one head in blocks [rows, m], all n rows in order.
Source = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class AttentionStore:
    """Weights [layers, heads, n, m] as chunks. kept[l][h]: entries per row, or 0 where the matrix is whole.

    layers, heads: the numbers by which they are known. entropy [L, H] in nats, distance [L, H] in tokens and the share
    of mass [L, H] are means over the rows of the exact weights; least_share [L, H] is that of the worst row.
    """

    n: int
    m: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    signed: bool
    kept: NDArray[np.int64]
    chunks: tuple[tuple[bytes, ...], ...]
    thumbs: NDArray[np.uint8]
    entropy: NDArray[np.float32]
    distance: NDArray[np.float32] | None
    share: NDArray[np.float32]
    least_share: NDArray[np.float32]

    @staticmethod
    def from_attention(
        attention: Sequence[Any],
        *,
        budget_mb: float = 64,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        batch: int = 0,
    ) -> AttentionStore:
        """From what a model returns as attentions: one [b, h, n, m] or [h, n, m] per layer, all of the same shape."""
        maps = [_matrices(weights, batch, layer) for layer, weights in enumerate(attention)]
        if not maps:
            raise ValueError("attention holds no layer; give one tensor [1, h, n, m] per layer")
        wrong = [tuple(each.shape) for each in maps if each.shape != maps[0].shape]
        if wrong:
            raise ValueError(f"attention has shapes {tuple(maps[0].shape)} and {wrong[0]}; all layers must agree")
        layers = _chosen(layers, len(maps), "layers")
        heads = _chosen(heads, maps[0].shape[0], "heads")
        signed = any(bool((maps[layer] < 0).any()) for layer in layers)
        writer = _Writer(layers, heads, maps[0].shape[1], maps[0].shape[2], budget_mb, signed)
        for layer in layers:
            writer.layer([_whole(maps[layer][head]) for head in heads])
        return writer.store()

    @staticmethod
    def from_calls(
        calls: Sequence[Any],
        *,
        budget_mb: float = 64,
        heads: Sequence[int] | None = None,
        batch: int = 0,
        signed: bool = False,
        mean: bool = False,
    ) -> AttentionStore:
        """From recorded attention calls of one stack and kind, one per layer. mean: the heads' mean, as one head.

        signed: weights may be negative, as those of differential attention are."""
        if not calls:
            raise ValueError("no calls were recorded; run the model inside `with record(model) as calls`")
        kinds = {(call.site.stack, call.site.kind) for call in calls}
        layers = [call.layer for call in calls]
        if len(kinds) > 1 or len(set(layers)) < len(layers):
            raise ValueError(
                f"calls of {sorted(kinds)}, layers {layers}: a store holds one stack and kind, each layer once; choose "
                "with record(model, stack=..., kind=...) and run one forward pass"
            )
        writer = None
        for call in calls:
            have = max(own.heads for own in calls)
            writer = writer or _writer_for(call, layers, heads, have, budget_mb, signed, mean)
            writer.layer(_sources(call, writer.heads, batch, mean))
        assert writer is not None
        return writer.store()

    def codes(self, layer: int, head: int) -> Rows:
        """A chunk opened; layer and head by their place in `layers` and `heads`."""
        return open_chunk(self.chunks[layer][head], self.n, self.m, bool(self.kept[layer, head]), self.signed)

    def matrix(self, layer: int, head: int) -> NDArray[np.float32]:
        """What is shown of a head, [n, m]; 0 where nothing was kept."""
        rows = self.codes(layer, head)
        shown = np.zeros((self.n, self.m), np.float32)
        shown[rows.row, rows.column] = rows.weight
        return shown

    @property
    def key(self) -> str:
        """A name made of the content: two views of one store share its bytes in a page."""
        digest = hashlib.blake2b(digest_size=6)
        for row in self.chunks:
            for chunk in row:
                digest.update(chunk)
        return digest.hexdigest()

    def spec(self, key: str) -> dict[str, Any]:
        """What a page must know before it opens a chunk."""
        return {
            "key": key, "n": self.n, "m": self.m, "layers": list(self.layers), "heads": list(self.heads),
            "signed": self.signed, "kept": self.kept.tolist(), "thumb": list(self.thumbs.shape[2:]),
            "entropy": rounded(self.entropy), "distance": None if self.distance is None else rounded(self.distance),
            "share": rounded(self.share, 5), "leastShare": rounded(self.least_share, 5),
        }  # fmt: skip

    def blobs(self, key: str) -> dict[str, bytes]:
        """The chunks and thumbnails, deflated, by the names under which a page asks for them."""
        found = {f"{key}/thumbs": deflate(self.thumbs.tobytes())}
        for layer, row in enumerate(self.chunks):
            found |= {f"{key}/{layer}/{head}": chunk for head, chunk in enumerate(row)}
        return found

    def mean_heads(self, budget_mb: float = 8) -> AttentionStore:
        """One head: the mean of what was kept of all heads, a row's missing mass being missing still."""
        count = len(self.heads)

        def mean(layer: int) -> Source:
            return lambda: [torch.from_numpy(sum(self.matrix(layer, head) for head in range(count)) / count)]

        writer = _Writer(self.layers, [0], self.n, self.m, budget_mb, self.signed)
        for layer in range(len(self.layers)):
            writer.layer([mean(layer)])
        return writer.store()


def read_store(
    model: nn.Module,
    inputs: Any,
    *,
    stack: str | None = None,
    kind: str | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    budget_mb: float = 64,
    batch: int = 0,
    signed: bool = False,
    mean: bool = False,
) -> AttentionStore:
    """Runs model(**inputs) once and stores its attention layer by layer, so that no layer waits for another's weights.

    Where the model has several stacks or kinds of attention, stack and kind must choose one.
    """
    chosen = choose(model, layers, stack, kind)
    found = sorted({(site.stack, site.kind) for site in chosen})
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__} attends in {found}; choose one of them with stack= and kind=")
    numbers = [site.layer for site in chosen]
    writers: list[_Writer] = []
    # Of layers that have fewer heads than others, as pruning leaves them, the rest have no weights.
    have = max((int(site.module.heads) for site in chosen if isinstance(site.module, Mechanism)), default=0)

    def reader(call: Any) -> None:
        nonlocal have
        if not writers:
            have = max(have, call.heads)
            writers.append(_writer_for(call, numbers, heads, have, budget_mb, signed, mean))
        if call.heads > have and heads is None and not mean:
            raise ValueError(f"{call.site.path} has {call.heads} heads, more than layers before it: choose heads=")
        writers[0].layer(_sources(call, writers[0].heads, batch, mean))

    with torch.no_grad(), tap(model, reader, layers=layers, stack=stack, kind=kind):
        model(**placed(model, inputs))
    if not writers:
        raise ValueError(f"{type(model).__name__} ran without attending in {found}")
    return writers[0].store()


class _Writer:
    """Takes layers in order and spends the budget on them."""

    def __init__(
        self, layers: Sequence[int], heads: Sequence[int], n: int, m: int, budget_mb: float, signed: bool
    ) -> None:
        if not n or not m:
            raise ValueError(f"attention of {n} by {m} tokens: there is nothing to show")
        if not budget_mb > 0:
            raise ValueError(f"budget_mb must be above 0; got {budget_mb}")
        self.layers, self.heads, self.n, self.m = list(layers), list(heads), n, m
        self.signed, self.budget = signed, SPARE * budget_mb * 1e6
        # Bytes of the sparse chunks so far: as they are, and as they would be without deflate.
        self.cost, self.plain = 1.0, 1.0
        self.rows_left = len(self.layers) * len(self.heads) * n
        self.done: list[list[_Head]] = []

    def layer(self, sources: Sequence[Source]) -> None:
        number = self.layers[len(self.done)] if len(self.done) < len(self.layers) else None
        if number is None:
            raise ValueError(f"more than {len(self.layers)} layers came: run one forward pass, without generation")
        row = []
        for head, source in zip(self.heads, sources, strict=True):
            known = self.plain > 1
            made = self._head(source, f"layer {number}, head {head}")
            if made.kept and not known:
                # What rows cost is known now: the first head is not to have less than those that follow.
                made = self._head(source, f"layer {number}, head {head}")
            self.budget -= len(made.chunk) * BASE64 + CHUNK_MARKUP
            self.rows_left -= self.n
            row.append(made)
        self.done.append(row)

    def _head(self, source: Source, where: str) -> _Head:
        per_row = max(0.0, self.budget / BASE64 / self.rows_left)
        index = 2 if self.m <= 65536 else 4
        whole = self.m + ROW_BYTES <= per_row
        real = per_row * self.plain / self.cost
        kept = 0 if whole else max(1, min(65535, int((real - ROW_BYTES) // (index + 1))))
        if kept >= self.m:
            kept = 0
        measures, parts, start = _Measures(self.n, self.m), [], 0
        for block in source():
            block = _checked(block, self.m, self.signed, where)
            measures.add(block, start)
            parts.append(encode(block, kept, self.signed))
            start += len(block)
        if start != self.n:
            raise ValueError(f"{where} gave {start} rows of weights; {self.n} were expected")
        chunk, share = pack(parts, kept, index)
        if kept:
            self.cost += len(chunk)
            self.plain += self.n * (ROW_BYTES + kept * (index + 1))
        return _Head(chunk, kept, share, measures)

    def store(self) -> AttentionStore:
        if len(self.done) < len(self.layers):
            raise ValueError(f"{len(self.done)} layers came of {len(self.layers)}")

        def grid(value: Callable[[_Head], Any]) -> NDArray[Any]:
            return np.array([[value(head) for head in row] for row in self.done])

        return AttentionStore(
            n=self.n, m=self.m, layers=tuple(self.layers), heads=tuple(self.heads), signed=self.signed,
            kept=grid(lambda head: head.kept), chunks=tuple(tuple(head.chunk for head in row) for row in self.done),
            thumbs=grid(lambda head: head.measures.thumb()),
            entropy=grid(lambda head: head.measures.entropy / self.n).astype(np.float32),
            distance=grid(lambda head: head.measures.distance / self.n).astype(np.float32)
            if self.n == self.m else None,
            share=grid(lambda head: head.share.mean()).astype(np.float32),
            least_share=grid(lambda head: head.share.min()).astype(np.float32),
        )  # fmt: skip


@dataclass(frozen=True)
class _Head:
    chunk: bytes
    kept: int
    share: NDArray[np.float64]
    measures: _Measures


class _Measures:
    """Sums over the rows of a head: entropy, distance, and the thumbnail, whose cells hold the mean over their rows of
    the weight on their columns."""

    def __init__(self, n: int, m: int) -> None:
        self.tall, self.wide = math.ceil(n / THUMB), math.ceil(m / THUMB)
        self.n, self.m, self.entropy, self.distance = n, m, 0.0, 0.0
        self.cells = torch.zeros(math.ceil(n / self.tall), math.ceil(m / self.wide), dtype=torch.float64)

    def add(self, block: Tensor, start: int) -> None:
        size = block.abs()
        total = size.sum(1, keepdim=True)
        part = size / torch.where(total > 0, total, 1)
        self.entropy += float(torch.special.entr(part).sum())
        rows = torch.arange(start, start + len(block), device=block.device)
        if self.n == self.m:
            columns = torch.arange(self.m, device=block.device)
            self.distance += float((part * (rows[:, None] - columns).abs()).sum())
        columns_of = torch.nn.functional.pad(size, (0, self.cells.shape[1] * self.wide - self.m))
        binned = columns_of.view(len(block), -1, self.wide).sum(2)
        self.cells.index_add_(0, (rows // self.tall).cpu(), binned.cpu().double())

    def thumb(self) -> NDArray[np.uint8]:
        rows = torch.full((len(self.cells), 1), float(self.tall))
        rows[-1] = self.n - self.tall * (len(self.cells) - 1)
        return (self.cells / rows).clamp(0, 1).sqrt().mul(255).round().to(torch.uint8).numpy()


def _checked(block: Tensor, m: int, signed: bool, where: str) -> Tensor:
    block = block.detach()
    if block.dim() != 2 or block.shape[1] != m:
        raise ValueError(f"{where} gave weights {tuple(block.shape)}; [rows, {m}] was expected")
    block = block.to(torch.promote_types(block.dtype, torch.float32))
    if not bool(torch.isfinite(block).all()):
        raise ValueError(f"{where} has weights that are NaN or infinite: look for a row that may attend to nothing")
    if not signed and bool((block < 0).any()):
        raise ValueError(f"{where} has negative weights; pass signed=True to store them")
    return block


def rounded(numbers: NDArray[Any], digits: int = 3) -> list[Any]:
    found: list[Any] = np.round(numbers.astype(np.float64), digits).tolist()
    return found


def _matrices(weights: Any, batch: int, layer: int) -> Tensor:
    """[h, n, m] of a layer's weights as they were given."""
    if weights is None:
        raise ValueError(f"attention of layer {layer} is None: load the model with attn_implementation='eager', or tap")
    found = torch.as_tensor(weights).detach()
    if found.dim() == 4 and 0 <= batch < len(found):
        return found[batch]
    if found.dim() != 3:
        raise ValueError(
            f"attention of layer {layer} has shape {tuple(found.shape)}; give [1, heads, queries, keys] or without the "
            f"first (batch={batch})"
        )
    return found


def _whole(weights: Tensor) -> Source:
    """In blocks that stay in a cache."""
    return lambda: weights.split(max(1, 2**19 // weights.shape[1]))


def _chosen(wanted: Sequence[int] | None, have: int, what: str) -> list[int]:
    numbers = list(range(have)) if wanted is None else [int(number) for number in wanted]
    wrong = [number for number in numbers if not 0 <= number < have]
    if wrong or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"{what} {numbers} of a model with {what} 0 to {have - 1}; choose among these, each once")
    return numbers


def _writer_for(
    call: Any,
    layers: Sequence[int],
    heads: Sequence[int] | None,
    have: int,
    budget_mb: float,
    signed: bool,
    mean: bool,
) -> _Writer:
    chosen = [0] if mean else _chosen(heads, have, "heads")
    n, m = (call.query.shape[2], call.key.shape[2]) if hasattr(call, "query") else call.weights(heads=[0]).shape[2:]
    return _Writer(layers, chosen, int(n), int(m), budget_mb, signed)


def _sources(call: Any, heads: Sequence[int], batch: int, mean: bool) -> list[Source]:
    if mean:
        return [lambda: _mean_blocks(call, batch)]
    return [lambda head=head: _blocks(call, head, batch) for head in heads]  # type: ignore[misc]


def _blocks(call: Any, head: int, batch: int) -> Iterator[Tensor]:
    gone = head >= call.heads
    for rows in call.blocks([0 if gone else head]):
        weights = call.weights([0 if gone else head], rows)[batch, 0]
        yield torch.zeros_like(weights) if gone else weights


def _mean_blocks(call: Any, batch: int) -> Iterator[Tensor]:
    for rows in call.blocks():
        yield call.weights(None, rows)[batch].mean(0)
