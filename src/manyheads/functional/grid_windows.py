"""Attention within windows of a grid of any number of axes, and what came of it back at its cells.

b batch, h heads, n cells in reading order, w windows, s queries and t keys of a window, d head dim. A layout is made of
one for each axis: which places of the axis stand together, [windows, places], -1 for a place that the axis lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.grouped import masked_softmax
from manyheads.functional.multihead import Heads
from manyheads.functional.weighted import FEW_KEYS, attend_weighted

# Queries of a tile along an axis: a wider tile reads fewer keys twice, and more that its mask forbids.
TILE = 8


@dataclass(frozen=True)
class Windows:
    """queries [w, s], keys [w, t]: cells in reading order, -1 where there is none; every cell is a query of one window.
    allowed: [w, s, t], which of the pairs meet, None for all."""

    queries: Tensor
    keys: Tensor
    allowed: Tensor | None = None


@dataclass(frozen=True)
class Axis:
    """The same along one axis, in places of it."""

    queries: Tensor
    keys: Tensor
    allowed: Tensor | None = None


def blocks(length: int, size: int, *, halo: int = 0, shift: int = 0, device: Any = None) -> Axis:
    """Neighbouring places, `size` at a time, the first window beginning `shift` places before the axis; its keys are
    these and `halo` more on either side."""
    starts = torch.arange(-shift, length, size, device=device)[:, None]
    queries = starts + torch.arange(size, device=device)
    keys = starts + torch.arange(-halo, size + halo, device=device)
    return Axis(_inside(queries, length), _inside(keys, length))


def spread(length: int, size: int, *, device: Any = None) -> Axis:
    """Windows of `size` places that span the axis, ceil(length / size) apart from each other."""
    step = -(-length // size)
    places = torch.arange(step, device=device)[:, None] + step * torch.arange(size, device=device)
    return Axis(_inside(places, length), _inside(places, length))


def taps(length: int, kernel: int, *, stride: int = 1, dilation: int = 1, device: Any = None) -> Axis:
    """The places that a convolution reads for every stride-th place, half of an odd kernel before it; the queries are
    the same places, so that a cell is one of several windows."""
    reach = dilation * (torch.arange(kernel, device=device) - (kernel - 1) // 2)
    places = _inside(torch.arange(0, length, stride, device=device)[:, None] + reach, length)
    return Axis(places, places)


def near(
    length: int,
    window: int,
    *,
    dilation: int = 1,
    stride: int = 1,
    causal: bool = False,
    tile: int = TILE,
    device: Any = None,
) -> Axis:
    """Of every place the `window` nearest ones of its residue modulo the dilation, in tiles of queries.

    At the ends the window is moved inward; `stride` neighbours share that of the one at stride // 2 of them (causal:
    the last place is the query's own, counted back from the last of the group). A residue with fewer places is seen
    whole.
    """
    longest = -(-length // dilation)
    tile = min(tile, longest)
    reach = min(tile + window - 1 + (0 if causal else stride - 1), longest)
    queries, keys, allowed = [], [], []
    for residue in range(min(dilation, length)):
        members = (length - residue - 1) // dilation + 1
        step = torch.arange(-(-members // tile) * tile, device=device).view(-1, tile)
        leader, first = _leaders(step.clamp(max=members - 1), members, window, stride, causal)
        start = first.amin(1, keepdim=True)
        key = start + torch.arange(reach, device=device)
        seen = (key[:, None] >= first[..., None]) & (key[:, None] < first[..., None] + window)
        if causal:
            seen = (key[:, None] <= step[..., None]) & (leader[..., None] - key[:, None] < window)
        queries.append(torch.where(step < members, residue + dilation * step, -1))
        there = (key >= 0) & (key < members)
        keys.append(torch.where(there, residue + dilation * key, -1))
        allowed.append(seen & there[:, None])
    return Axis(torch.cat(queries), torch.cat(keys), torch.cat(allowed))


def _leaders(step: Tensor, members: int, window: int, stride: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Whose window each place has, and where it begins."""
    if causal:
        leader = (step // stride * stride + stride - 1).clamp(max=members - 1)
        return leader, (leader - window + 1).clamp(min=0)
    leader = (step // stride * stride + stride // 2).clamp(max=members - 1)
    return leader, (leader - window // 2).clamp(max=members - window).clamp(min=0)


def _inside(places: Tensor, length: int) -> Tensor:
    return torch.where((places >= 0) & (places < length), places, -1)


def windows_of(axes: Sequence[Axis], sizes: Sequence[int], key_sizes: Sequence[int] | None = None) -> Windows:
    """The windows of a grid of these sizes whose axes are laid out so; keys may stand in a grid of other sizes."""
    queries = _cells([axis.queries for axis in axes], sizes)
    keys = _cells([axis.keys for axis in axes], sizes if key_sizes is None else key_sizes)
    allowed: Tensor | None = None
    if any(axis.allowed is not None for axis in axes):
        for axis in axes:
            own = axis.allowed
            if own is None:
                own = (axis.keys >= 0)[:, None].expand(-1, axis.queries.shape[1], -1)
            allowed = own if allowed is None else _crossed(allowed, own)
    return Windows(queries, keys, allowed)


def _crossed(one: Tensor, other: Tensor) -> Tensor:
    """[w, s, t] and [w', s', t'] -> [w w', s s', t t'], both true."""
    both = one[:, None, :, None, :, None] & other[None, :, None, :, None, :]
    return both.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _cells(axes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    cells = axes[0]
    for places, size in zip(axes[1:], sizes[1:], strict=True):
        left, right = cells[:, None, :, None], places[None, :, None, :]
        cells = torch.where((left < 0) | (right < 0), -1, left * size + right).flatten(2, 3).flatten(0, 1)
    return cells


def gathered(x: Tensor, cells: Tensor) -> Tensor:
    """x [.., n, d], cells [w, s] -> [.., w, s, d], zeros where there is no cell."""
    n = x.shape[-2]
    padded = F.pad(x, (0, 0, 0, 1))
    return padded.index_select(-2, torch.where(cells < 0, n, cells).flatten()).unflatten(-2, tuple(cells.shape))


def put_back(parts: Tensor, windows: Windows, n: int) -> Tensor:
    """[.., w, s, d] -> [.., n, d], each cell from the window that it is a query of."""
    flat = windows.queries.flatten()
    place = torch.arange(len(flat), device=flat.device)
    where = place.new_zeros(n + 1).scatter(0, torch.where(flat < 0, n, flat), place)[:n]
    return parts.flatten(-3, -2).index_select(-2, where)


def added_up(parts: Tensor, cells: Tensor, n: int) -> Tensor:
    """[.., w, s, d] -> [.., n, d], a cell of several windows being the sum of what they hold for it."""
    place = torch.where(cells < 0, n, cells).flatten()
    flat = parts.flatten(-3, -2)
    return flat.new_zeros(*flat.shape[:-2], n + 1, flat.shape[-1]).index_add(-2, place, flat)[..., :n, :]


def whole_weights(inner: Tensor, windows: Windows, n: int, m: int) -> Tensor:
    """Weights within windows [b, h, w, s, t] -> over all cells in reading order [b, h, n, m]; what a window gives to
    places that the grid lacks is left out."""
    row, column = (torch.where(c < 0, last, c) for c, last in ((windows.queries, n), (windows.keys, m)))
    pair = (row[:, :, None] * (m + 1) + column[:, None, :]).flatten()
    b, h = inner.shape[:2]
    whole = inner.new_zeros(b, h, (n + 1) * (m + 1)).index_add(2, pair, inner.flatten(2))
    return whole.view(b, h, n + 1, m + 1)[..., :n, :m]


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    *,
    scale: float,
    real: Tensor | None = None,
    bias: Tensor | None = None,
    zero_outside: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q [b, h, n, d], k and v [b, h, m, d] -> [b, h, n, d] and the weights [b, h, n, m] where asked for.

    real: [b, m], which cells are keys. bias: added to the scores, [h, s, t], or [b, h, w, s, t]. zero_outside: places
    that the grid lacks are keys of zeros, with scores and weight, as in a padded convolution; else they are no keys.
    Memory grows with n t. Rows with nothing to attend to are zero.
    """
    b, h, n, _ = q.shape
    m, count = k.shape[2], len(windows.queries)
    queries = gathered(q.flatten(0, 1), windows.queries)
    keys, values = (gathered(part.flatten(0, 1), windows.keys) for part in (k, v))
    allowed = _allowed(windows, real, h, zero_outside)
    if bias is None:
        mixed, inner = attend_weighted(queries, keys, values, allowed, scale=scale, need_weights=need_weights)
    else:
        bias = bias.to(q.dtype)
        bias = bias.flatten(0, 1) if bias.ndim == 5 else bias.repeat(b, 1, 1)[:, None]
        mixed, inner = _biased(queries, keys, values, allowed, bias, scale, need_weights)
    output = put_back(mixed, windows, n).unflatten(0, (b, h))
    if inner is None:
        return output, None
    inner = inner.view(b, h, count, *inner.shape[-2:])
    return output, whole_weights(inner, windows, n, m)


def attend_cells(
    layer: Heads,
    x: Tensor,
    windows: Windows,
    real: Tensor | None,
    need_weights: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Self attention of x [b, *sizes, e] within windows, real [b, *sizes] -> the same shape, and the weights."""
    cells, sizes = x.flatten(1, -2), x.shape[1:-1]
    seen = None if real is None else real.flatten(1)
    k, v = layer.read(cells)
    q = layer.split(layer.q_proj(cells))
    mixed, weights = attend_windows(
        q, k, v, windows, scale=layer.scale, real=seen, bias=bias, need_weights=need_weights
    )
    return layer.join(mixed).unflatten(1, tuple(sizes)), weights


def _allowed(windows: Windows, real: Tensor | None, heads: int, zero_outside: bool) -> Tensor | None:
    """[1 or b h, w, 1 or s, t], or None for everything."""
    allowed = None if windows.allowed is None else windows.allowed[None]
    there = windows.keys >= 0
    if not zero_outside and allowed is None:
        # Traced, the layout is no number yet: a mask of what is there holds in any case.
        allowed = None if not torch.compiler.is_compiling() and bool(there.all()) else there[None, :, None]
    if real is None:
        return allowed
    seen = gathered(real[..., None], windows.keys)[..., 0]
    if zero_outside:
        seen = seen | ~there
    seen = seen.repeat_interleave(heads, 0)[:, :, None]
    return seen if allowed is None else seen & allowed


def _biased(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor, scale: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    if not need_weights and allowed is None and k.shape[2] >= FEW_KEYS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    weights = masked_softmax((q * scale) @ k.transpose(-1, -2) + bias, allowed)
    return weights @ v, weights if need_weights else None


def extents(real: Tensor) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """real [b, *sizes] -> rows of the batch by the box that holds their real cells, (first, last + 1) for each axis;
    rows without any are left out."""
    spans = []
    for axis in range(1, real.ndim):
        there = real.flatten(1, -1) if real.ndim == 2 else real.movedim(axis, 1).flatten(2).any(-1)
        last = there.shape[1] - there.flip(1).int().argmax(1)
        spans.append(torch.stack([there.int().argmax(1), last], 1))
    boxes: dict[tuple[tuple[int, int], ...], list[int]] = {}
    some = real.flatten(1).any(1).tolist()
    for row, box in enumerate(torch.stack(spans, 1).tolist()):
        if some[row]:
            boxes.setdefault(tuple((first, last) for first, last in box), []).append(row)
    return boxes


def over_extents(
    x: Tensor, real: Tensor | None, run: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """run(x, real) -> output and weights, on the box of real cells of each row: for what depends on the size of a grid.

    x [b, *sizes, e], real [b, *sizes] -> [b, *sizes, any] and [b, h, n, n] or None, zeros outside of the boxes. Rows of
    one box run together; real is None where all cells of the box are.
    """
    if real is None:
        return run(x, None)
    sizes, parts = x.shape[1:-1], []
    for box, rows in extents(real).items():
        cut: Any = (rows, *(slice(first, last) for first, last in box))
        seen = real[cut]
        parts.append((box, rows, *run(x[cut], None if bool(seen.all()) else seen)))
    if not parts:  # nothing is real: zeros, of the width that a run gives
        one, inner = run(x.new_zeros(1, *[1] * len(sizes), x.shape[-1]), None)
        empty = x[..., :1].masked_fill(~real[..., None], 0.0).expand(*x.shape[:-1], one.shape[-1])
        n = math.prod(sizes)
        return empty, None if inner is None else inner.new_zeros(x.shape[0], inner.shape[1], n, n)
    _, _, first, inner = parts[0]
    output = first.new_zeros(x.shape[0], *sizes, first.shape[-1])
    n = math.prod(sizes)
    weights = None if inner is None else inner.new_zeros(x.shape[0], inner.shape[1], n, n)
    cells = torch.arange(n, device=x.device).view(sizes)
    for box, rows, mixed, inner in parts:
        places: Any = tuple(slice(start, stop) for start, stop in box)
        output[(rows, *places)] = mixed
        if weights is not None and inner is not None:
            own = cells[places].flatten()
            grown = inner.new_zeros(*inner.shape[:3], n).index_copy(3, own, inner)
            weights[rows] = inner.new_zeros(*inner.shape[:2], n, n).index_copy(2, own, grown)
    return output, weights
