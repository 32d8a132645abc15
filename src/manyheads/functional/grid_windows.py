"""Attention within windows of a grid of any number of axes, and what came of it back at its cells.

b batch, h heads, n cells in reading order, w windows, s queries and t keys of a window, d head dim. A layout is made of
one for each axis: which places of the axis stand together, [windows, places], -1 for a place that the axis lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.cells import shown
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.multihead import Heads
from manyheads.functional.weighted import FEW_KEYS, attend_weighted

# Queries of a tile along an axis: a wider tile reads fewer keys twice, and more that its mask forbids.
TILE = 8
# Of how many layouts, and up to how many cells, the windows are kept: 6 MB each at most where a cell sees 7 x 7.
KEPT, KEPT_CELLS = 32, 1 << 13


@dataclass(frozen=True)
class Windows:
    """queries [w, s], keys [w, t]: cells in reading order, -1 where there is none; every cell is a query of one window.
    allowed: [w, s, t], which of the pairs meet, None for all."""

    queries: Tensor
    keys: Tensor
    allowed: Tensor | None = None

    @cached_property
    def whole(self) -> tuple[bool, bool]:
        """Whether every query, and every key, is a cell; False where there are no numbers to tell by."""
        queries, keys = (not part.is_meta and bool((part >= 0).all()) for part in (self.queries, self.keys))
        return queries, keys

    @cached_property
    def query_rows(self) -> Tensor:
        """[w s], which row each query is behind one for what is no cell."""
        with torch.inference_mode(False):
            return _behind_one(self.queries)

    @cached_property
    def key_rows(self) -> Tensor:
        """[w t], likewise."""
        with torch.inference_mode(False):
            return _behind_one(self.keys)

    @cached_property
    def kept_places(self) -> dict[int, Tensor]:
        """Of so many cells, what `_places` says."""
        return {}

    @property
    def blocked(self) -> Tensor | None:
        """[w, 1, s, t] to be added to scores, -inf where a pair does not meet; None where all do. Queries that are no
        cells, which nobody reads, may see everything, so that nothing is NaN."""
        # Traced, nothing is kept: before Python 3.12 cached_property takes a lock, at which the graph would break.
        return self._blocking() if torch.compiler.is_compiling() else self._kept_blocking

    @cached_property
    def _kept_blocking(self) -> Tensor | None:
        with torch.inference_mode(False):
            return self._blocking()

    def _blocking(self) -> Tensor | None:
        allowed = _meeting(self)
        if allowed is None:
            return None
        allowed = allowed.expand(-1, self.queries.shape[1], -1)
        forbidden = ~(allowed | ~allowed.any(-1, keepdim=True))
        return torch.zeros(forbidden.shape, device=forbidden.device).masked_fill(forbidden, -torch.inf)[:, None]


class Axis(NamedTuple):
    """How one axis is laid out: `lay` makes its queries, keys and what is allowed, in places of it, of `length` and
    `sizes`."""

    lay: Callable[..., Laid]
    length: int
    sizes: tuple[int, ...]


class Laid(NamedTuple):
    """The same as of `Windows`, along one axis."""

    queries: Tensor
    keys: Tensor
    allowed: Tensor | None = None


def blocks(length: int, size: int, *, halo: int = 0, shift: int = 0, stride: int = 1) -> Axis:
    """Neighbouring places, `size` at a time, the first window beginning `shift` places before the axis; its keys are
    these and `halo` more on either side. stride: queries are every so-manieth of a block's places, counted as places
    of an axis of these alone; a divisor of the size."""
    return Axis(_blocks, length, (size, halo, shift, stride))


def _blocks(device: Any, length: int, size: int, halo: int, shift: int, stride: int) -> Laid:
    starts = torch.arange(-shift, length, size, device=device)[:, None]
    queries = starts // stride + torch.arange(size // stride, device=device)
    keys = starts + torch.arange(-halo, size + halo, device=device)
    return Laid(_inside(queries, -(-length // stride)), _inside(keys, length))


def spread(length: int, size: int) -> Axis:
    """Windows of `size` places that span the axis, ceil(length / size) apart from each other."""
    return Axis(_spread, length, (size,))


def _spread(device: Any, length: int, size: int) -> Laid:
    step = -(-length // size)
    places = torch.arange(step, device=device)[:, None] + step * torch.arange(size, device=device)
    return Laid(_inside(places, length), _inside(places, length))


def taps(length: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> Axis:
    """The places that a convolution reads for every stride-th place, half of an odd kernel before it; the queries are
    the same places, so that a cell is one of several windows."""
    return Axis(_taps, length, (kernel, stride, dilation))


def _taps(device: Any, length: int, kernel: int, stride: int, dilation: int) -> Laid:
    reach = dilation * (torch.arange(kernel, device=device) - (kernel - 1) // 2)
    places = _inside(torch.arange(0, length, stride, device=device)[:, None] + reach, length)
    return Laid(places, places)


def near(
    length: int, window: int, *, dilation: int = 1, stride: int = 1, causal: bool = False, tile: int = TILE
) -> Axis:
    """Of every place the `window` nearest ones of its residue modulo the dilation, in tiles of queries.

    At the ends the window is moved inward; `stride` neighbours share that of the one at stride // 2 of them (causal:
    the last place is the query's own, counted back from the last of the group). A residue with fewer places is seen
    whole.
    """
    return Axis(_near, length, (window, dilation, stride, causal, tile))


def _near(device: Any, length: int, window: int, dilation: int, stride: int, causal: bool, tile: int) -> Laid:
    longest = -(-length // dilation)
    tile = min(tile, longest)
    reach = min(tile + window - 1 + (0 if causal else stride - 1), longest)
    queries, keys, allowed = [], [], []
    for residue in range(min(dilation, length)):
        members = (length - residue - 1) // dilation + 1
        step = torch.arange(-(-members // tile) * tile, device=device).view(-1, tile)
        leader, first = _leaders(step.clamp(max=members - 1), members, window, stride, causal)
        # At the end moved inward, so that no key is a place that the axis lacks.
        start = first.amin(1, keepdim=True).clamp(max=max(members - reach, 0))
        key = start + torch.arange(reach, device=device)
        seen = (key[:, None] >= first[..., None]) & (key[:, None] < first[..., None] + window)
        if causal:
            seen = (key[:, None] <= step[..., None]) & (leader[..., None] - key[:, None] < window)
        queries.append(torch.where(step < members, residue + dilation * step, -1))
        there = (key >= 0) & (key < members)
        keys.append(torch.where(there, residue + dilation * key, -1))
        allowed.append(seen & there[:, None])
    return Laid(torch.cat(queries), torch.cat(keys), torch.cat(allowed))


def _leaders(step: Tensor, members: int, window: int, stride: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Whose window each place has, and where it begins."""
    if causal:
        leader = (step // stride * stride + stride - 1).clamp(max=members - 1)
        return leader, (leader - window + 1).clamp(min=0)
    leader = (step // stride * stride + stride // 2).clamp(max=members - 1)
    return leader, (leader - window // 2).clamp(max=members - window).clamp(min=0)


def _inside(places: Tensor, length: int) -> Tensor:
    return torch.where((places >= 0) & (places < length), places, -1)


def windows_of(
    axes: Sequence[Axis], sizes: Sequence[int], key_sizes: Sequence[int] | None = None, *, device: Any = None
) -> Windows:
    """The windows of a grid of these sizes whose axes are laid out so; keys may stand in a grid of other sizes.

    Those of small grids are kept for the next call: to lay them out takes as long as a third of the attention."""
    if torch.compiler.is_compiling() or math.prod(sizes) > KEPT_CELLS or type(torch.empty(0)) is not Tensor:
        return _windows(tuple(axes), tuple(sizes), None if key_sizes is None else tuple(key_sizes), device)
    with torch.inference_mode(False):  # else what is kept could not be a part of a later pass with gradients
        return _kept(tuple(axes), tuple(sizes), None if key_sizes is None else tuple(key_sizes), device)


def _windows(axes: tuple[Axis, ...], sizes: tuple[int, ...], key_sizes: tuple[int, ...] | None, device: Any) -> Windows:
    laid = [axis.lay(device, axis.length, *axis.sizes) for axis in axes]
    queries = _cells([axis.queries for axis in laid], sizes)
    keys = _cells([axis.keys for axis in laid], sizes if key_sizes is None else key_sizes)
    allowed: Tensor | None = None
    if any(axis.allowed is not None for axis in laid):
        for axis in laid:
            own = axis.allowed
            if own is None:
                own = (axis.keys >= 0)[:, None].expand(-1, axis.queries.shape[1], -1)
            allowed = own if allowed is None else _crossed(allowed, own)
    return Windows(queries, keys, allowed)


_kept = lru_cache(maxsize=KEPT)(_windows)


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
    return _behind_zeros(x).index_select(-2, _behind_one(cells)).unflatten(-2, tuple(cells.shape))


def _behind_zeros(x: Tensor) -> Tensor:
    """x [.., n, d] behind a row of zeros. PyTorch's padding writes all of it twice."""
    return torch.cat([x.new_zeros(*x.shape[:-2], 1, x.shape[-1]), x], -2)


def _behind_one(cells: Tensor) -> Tensor:
    return (cells + 1).flatten()


def put_back(parts: Tensor, windows: Windows, n: int) -> Tensor:
    """[.., w, s, d] -> [.., n, d], each cell from the window that it is a query of."""
    return parts.flatten(-3, -2).index_select(-2, _places(windows, n))


def _places(windows: Windows, n: int) -> Tensor:
    """Where each of n cells stands among the queries of all windows, one behind the other."""
    if torch.compiler.is_compiling():
        return _found_places(windows.queries, n)
    held = windows.kept_places
    if n not in held:
        with torch.inference_mode(False):
            held[n] = _found_places(windows.queries, n)
    return held[n]


def _found_places(queries: Tensor, n: int) -> Tensor:
    flat = queries.flatten()
    place = torch.arange(len(flat), device=flat.device)
    return place.new_zeros(n + 1).scatter(0, torch.where(flat < 0, n, flat), place)[:n]


def within_windows(
    grid: Tensor, real: Tensor | None, window: int, attend: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """attend(grid, real) on each window x window square of [b, height, width, e] as a grid of its own, filled up with
    padding at the rim, and back in place."""
    sizes = grid.shape[1:3]
    windows = windows_of([blocks(size, window) for size in sizes], sizes, device=grid.device)
    cells = gathered(shown(grid, real).flatten(1, 2), windows.queries)
    there: Tensor | None = None
    if real is not None:
        there = gathered(real.flatten(1)[..., None], windows.queries)[..., 0]
    elif torch.compiler.is_compiling() or not windows.whole[0]:
        there = (windows.queries >= 0).expand(cells.shape[:-1])
    squares, seen = (t if t is None else t.flatten(0, 1).unflatten(1, (window, window)) for t in (cells, there))
    assert squares is not None
    found = attend(squares, seen).reshape(cells.shape)
    return put_back(found, windows, math.prod(sizes)).unflatten(1, tuple(sizes))


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
    bias: Tensor | Callable[[Tensor], Tensor] | None = None,
    zero_outside: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q [b, h, n, d], k and v [b, h, m, d] -> [b, h, n, d] and the weights [b, h, n, m] where asked for.

    real: [b, m], which cells are keys. bias: added to the scores, [h, s, t], or what makes [w, b h, s, t] of the
    windows' queries [w, b h, s, d]. zero_outside: places that the grid lacks are keys of zeros, with scores and weight,
    as in a padded convolution; else they are no keys. Memory grows with n t. Rows with nothing to attend to are zero.
    """
    (b, h, n, _), m = q.shape, k.shape[2]
    asking, read = _behind(windows)
    queries = _cut(q, windows.queries, asking)
    keys, values = (_cut(part, windows.keys, read) for part in (k, v))
    added = bias(queries) if callable(bias) else None if bias is None else bias.repeat(b, 1, 1)[None]
    if need_weights or keys.shape[2] < FEW_KEYS or real is not None:
        allowed = None if zero_outside and windows.allowed is None else _meeting(windows)
        allowed = None if allowed is None else allowed[:, None]
        if real is not None:
            allowed = _seen(windows, real, h, zero_outside, allowed)
        mixed, inner = _weighted(queries, keys, values, allowed, added, scale, need_weights)
    else:
        blocked = None if zero_outside and windows.allowed is None else windows.blocked
        mask = _sum(None if added is None else added.to(q.dtype), None if blocked is None else blocked.to(q.dtype))
        mixed, inner = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale), None
    flat = mixed.transpose(1, 2).flatten(0, 1).flatten(1)
    output = flat.index_select(0, _places(windows, n)).view(n, b, h, -1).permute(1, 2, 0, 3)
    if inner is None:
        return output, None
    return output, whole_weights(inner.unflatten(1, (b, h)).permute(1, 2, 0, 3, 4), windows, n, m)


def _behind(windows: Windows) -> tuple[Tensor | None, Tensor | None]:
    """For `_cut`, of queries and of keys; traced, nothing is kept, nor known of what is there."""
    if torch.compiler.is_compiling():
        return _behind_one(windows.queries), _behind_one(windows.keys)
    whole = windows.whole
    return None if whole[0] else windows.query_rows, None if whole[1] else windows.key_rows


def _cut(x: Tensor, cells: Tensor, behind: Tensor | None) -> Tensor:
    """x [b, h, n, d], cells [w, s] -> [w, b h, s, d]. A cell's features of all rows and heads are read at once, and one
    mask of the windows serves all of them. behind: the cells as `_behind_one` has them, None where all are there."""
    b, h, n, d = x.shape
    rows = x.permute(2, 0, 1, 3).reshape(n, b * h * d)
    rows, index = (rows, cells.flatten()) if behind is None else (_behind_zeros(rows), behind)
    found = rows.index_select(0, index)
    return found.view(*cells.shape, b * h, d).transpose(1, 2)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


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


def _meeting(windows: Windows) -> Tensor | None:
    """[w, s or 1, t], which pairs meet, keys that are no cells meeting none; None for all."""
    # Traced, the layout is no number yet: a mask of what is there holds in any case.
    if windows.allowed is not None:
        return windows.allowed
    if not torch.compiler.is_compiling() and windows.whole[1]:
        return None
    return (windows.keys >= 0)[:, None]


def _seen(windows: Windows, real: Tensor, heads: int, zero_outside: bool, allowed: Tensor | None) -> Tensor:
    """[w, b h, 1 or s, t]"""
    seen = gathered(real[..., None], windows.keys)[..., 0]
    if zero_outside:
        seen = seen | (windows.keys < 0)
    seen = seen.repeat_interleave(heads, 0).transpose(0, 1)[:, :, None]
    return seen if allowed is None else seen & allowed


def _weighted(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None, scale: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    if bias is None:
        return attend_weighted(q, k, v, allowed, scale=scale, need_weights=need_weights)
    weights = masked_softmax((q * scale) @ k.transpose(-1, -2) + bias.to(q.dtype), allowed)
    return weights @ v, weights if need_weights else None
