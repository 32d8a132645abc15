"""Combiner: full attention by way of regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention

PARTITIONS = ("fixed", "logsparse", "axial", "mixture")

# Queries whose tokens and regions are gathered at once.
ROWS = 64
# Queries whose scores are held at once where whole rows of them share their keys.
BY_ROW = 1024


class _Regions(NamedTuple):
    """Summaries: keys and values [b, h, t, d]; spread [b, h, t, m]: the weights of a region's tokens within it, where
    asked for."""

    keys: Tensor
    values: Tensor
    spread: Tensor | None


@register
class Combiner(SoftmaxAttention):
    """Every token sees all of its past: some tokens directly, the others through the regions that they are in.

        softmax over D_i and the regions R of i, jointly, of q_i . k_j / sqrt(d) and q_i . (max of k over R) / sqrt(d)
        value of R: softmax over j in R of ((max of q over R) . k_j / sqrt(d)), times v_j
        weight of j: its own if j is in D_i, else that of R times the share of j in R

    partition, for a sequence cut into rows of `block` tokens; D_i and the regions hold each token 0 .. i:
        fixed      D: own row;  R: the other rows (causal: those before)
        logsparse  D: i itself;  R: for each bit set in i, the aligned run of that length before it (causal only)
        axial      D: own row up to i, own column above it;  R: the other columns above the row, where max is the
                   running maximum over rows (causal only)
        mixture    axial, and as R too each row above, left of i's column and right of it: there a token counts twice
    Source: arXiv:2107.05768 and its released JAX code, whose axial_mixture is the mixture and without rows axial. It
    counts a noncausal token's own row twice, directly and as a region; here it is no region. Rows are counted over real
    tokens. A dense mask is refused: a summary cannot leave tokens out for some queries.
    """

    shares_kv = False
    card = Card(
        name="combiner",
        title="Combiner: Full Attention Transformer with Sparse Computation Cost",
        reference="arXiv:2107.05768",
        family=Family.SELECTION,
        patterns={"noncausal-self", "causal-self"},
        time="n block + n^2 / block",
        state="n",
        example={"block": 4},
        notes="partition logsparse costs n log n, axial and mixture n sqrt(n) at best; decoding makes the summaries "
        "anew.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        block: int = 64,
        partition: str = "fixed",
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        if partition not in PARTITIONS or block < 1:
            raise ValueError(
                f"{self.card.name}: partition={partition!r}, block={block}; want one of {list(PARTITIONS)}, block >= 1"
            )
        if partition != "fixed" and not causal:
            raise ValueError(f"{self.card.name}: partition={partition!r} has a causal form only; want causal=True")
        self.block, self.partition = block, partition

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"{self.card.name}: a dense mask was given, but its regions are summarised for all queries at once; "
                "give key padding [batch, m] as the mask"
            )
        positions, n = call.query_positions(x), x.shape[1]
        q, k, v = self.project(x, x)
        q, k = self.position(q, k, positions, positions)
        q, real, own = q * self.scale, call.padding, slice(call.seen, call.seen + n)
        if call.state is not None:
            usual = torch.ones(1, call.seen + n, dtype=torch.bool, device=x.device)
            real = call.state.append_optional("padding", real, usual)
            q, k, v = (call.state.append(name, t) for name, t in (("queries", q), ("keys", k), ("values", v)))
            call.state.advance(n)
        m = k.shape[2]
        slots = torch.arange(m, device=x.device)[None] if real is None else (real.cumsum(1) - 1).clamp(min=0)
        if real is not None:
            # Real tokens to the front, in their order; what is padding is behind them, and zero.
            order = (~real).int().sort(dim=1, stable=True).indices
            q, k, v = (_take(t.masked_fill(~real[:, None, :, None], 0.0), order) for t in (q, k, v))
        count = slots.new_full((1,), m) if real is None else real.sum(1)
        mixed, weights = self._all_rows(q, k, v, slots[:, own], count, call.need_weights)
        if real is not None:
            mixed = mixed.masked_fill(~real[:, None, own, None], 0.0)
            if weights is not None:
                weights = weights.gather(3, slots[:, None, None].expand(-1, self.heads, n, -1))
                weights = weights.masked_fill(~(real[:, None, own, None] & real[:, None, None]), 0.0)
        output, losses = self.output(mixed, x, call)
        return Result(output, weights, losses)

    def _all_rows(
        self, q: Tensor, k: Tensor, v: Tensor, places: Tensor, count: Tensor, spread: bool
    ) -> tuple[Tensor, Tensor | None]:
        """q, k, v [b, h, m, d] without holes, places [b or 1, n] of the queries, count [b or 1] of real tokens."""
        axial = self.partition in ("axial", "mixture")
        regions = self._axial_regions(q, k, v, spread) if axial else self._runs(q, k, v, count, spread)
        if self.partition == "fixed" and not spread and places.shape[1] >= self.block:
            return self._by_row(q, k, v, places, regions, count), None
        parts = []
        for start in range(0, places.shape[1], ROWS):
            place = places[:, start : start + ROWS].expand(q.shape[0], -1)
            parts.append(self._rows(_take(q, place), k, v, place, regions, count))
        weights = torch.cat([weight for _, weight in parts if weight is not None], 2) if spread else None
        return torch.cat([mixed for mixed, _ in parts], 2), weights

    def _by_row(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor, regions: _Regions, count: Tensor) -> Tensor:
        """The queries of a row share their keys, its tokens and all summaries: matrix products, nothing gathered."""
        size, slots = self.block, torch.arange(self.block, device=q.device)
        # Traced, places are no numbers yet: then rows before the first that is asked for are computed too.
        first = 0 if torch.compiler.is_compiling() else int(places.min()) // size
        q, k, v = (F.pad(t, (0, 0, 0, -t.shape[2] % size)).unflatten(2, (-1, size)) for t in (q, k, v))
        own = torch.arange(q.shape[2], device=q.device)
        step, outs = max(1, BY_ROW // size), []
        for start in range(first, q.shape[2], step):
            rows = slice(start, start + step)
            asking, row = q[:, :, rows], own[rows, None]
            tokens = row * size + slots
            seen = (slots <= slots[:, None]) if self.causal else (tokens < count[:, None, None])[:, None, :, None]
            there = own < row if self.causal else (own != row) & (own * size < count[:, None, None])
            scores = torch.cat((asking @ k[:, :, rows].mT, asking @ regions.keys[:, :, None].mT), -1)
            seen = seen.expand(len(count), 1, len(row), size, size)
            there = there.view(-1, 1, len(row), 1, len(own)).expand(len(count), 1, -1, size, -1)
            near, far = masked_softmax(scores, torch.cat((seen, there), -1)).split([size, len(own)], -1)
            outs.append((near @ v[:, :, rows] + far @ regions.values[:, :, None]).flatten(2, 3))
        return _take(torch.cat(outs, 2), (places - first * size).expand(q.shape[0], -1))

    def _rows(
        self, q: Tensor, k: Tensor, v: Tensor, place: Tensor, regions: _Regions, count: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """q [b, h, r, d] at place [b, r]."""
        (b, h, r, _), m = q.shape, k.shape[2]
        tokens, seen = self._direct(place, m, count)
        index, there = self._indirect(place, m, count)
        near_k, near_v = (_take(t, tokens.flatten(1)).unflatten(2, tokens.shape[1:]) for t in (k, v))
        far_k, far_v = (_take(t, index.flatten(1)).unflatten(2, index.shape[1:]) for t in regions[:2])
        scores = torch.cat([near_k, far_k], 3) @ q[..., None]
        weights = masked_softmax(scores.squeeze(-1), torch.cat([seen, there], -1)[:, None].expand(b, h, r, -1))
        mixed = (weights[..., None, :] @ torch.cat([near_v, far_v], 3)).squeeze(-2)
        if regions.spread is None:
            return mixed, None
        near, far = weights.split([tokens.shape[-1], index.shape[-1]], -1)
        full = weights.new_zeros(b, h, r, m).scatter_add(3, tokens[:, None].expand_as(near), near)
        by_region = weights.new_zeros(b, h, r, regions.spread.shape[2])
        return mixed, full + by_region.scatter_add(3, index[:, None].expand_as(far), far) @ regions.spread

    # -- who is seen directly, and through which regions ---------------------------------------------------------

    def _direct(self, place: Tensor, m: int, count: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [b, r, x] and which of them count."""
        if self.partition == "logsparse":
            return place[..., None], torch.ones_like(place[..., None], dtype=torch.bool)
        row = torch.arange(min(self.block, m), device=place.device)
        tokens = (place // self.block * self.block)[..., None] + row
        seen = tokens <= place[..., None] if self.causal else tokens < count[:, None, None]
        if self.partition != "fixed":
            above = torch.arange(-(-m // self.block), device=place.device) * self.block
            above = (place % self.block)[..., None] + above
            tokens = torch.cat([tokens, above], -1)
            seen = torch.cat([seen, above < (place // self.block * self.block)[..., None]], -1)
        return tokens.clamp(max=m - 1), seen

    def _indirect(self, place: Tensor, m: int, count: Tensor) -> tuple[Tensor, Tensor]:
        """Regions [b, r, y] and which of them count."""
        if self.partition == "logsparse":
            levels, starts = _levels(m)
            run = place[..., None] >> torch.arange(levels, device=place.device)
            return (run - 1).clamp(min=0) + torch.tensor(starts, device=place.device), run % 2 == 1
        row = (place // self.block)[..., None]
        rows = torch.arange(-(-m // self.block), device=place.device)
        if self.partition != "fixed":
            own, column = (place % self.block)[..., None], torch.arange(self.block, device=place.device)
            index, there = (row - 1) * self.block + column, (row > 0) & (column != own)
            if self.partition == "mixture":
                first, size = rows * self.block, len(rows) * self.block
                index = torch.cat([index, size + first + own - 1, 2 * size + first + own + 1], -1)
                left, right = (rows < row) & (own > 0), (rows < row) & (own < self.block - 1)
                there = torch.cat([there, left, right], -1)
            return index.masked_fill(~there, 0), there
        there = rows < row if self.causal else (rows != row) & (rows * self.block < count[:, None, None])
        return rows.expand(*place.shape, -1), there

    # -- summaries -------------------------------------------------------------------------------------------------

    def _runs(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor, spread: bool) -> _Regions:
        """Aligned runs: the rows, or for logsparse those of length 1, 2, 4, .., end to end."""
        lengths = [self.block] if self.partition == "fixed" else [1 << level for level in range(_levels(k.shape[2])[0])]
        parts = [_run_regions(q, k, v, length, count, spread) for length in lengths]
        joined = torch.cat([p.spread for p in parts if p.spread is not None], 2) if spread else None
        return _Regions(torch.cat([p.keys for p in parts], 2), torch.cat([p.values for p in parts], 2), joined)

    def _axial_regions(self, q: Tensor, k: Tensor, v: Tensor, spread: bool) -> _Regions:
        """Region s block + u: column u down to row s. For the mixture, behind those: row s up to column u, and behind
        those: row s from column u on."""
        m = k.shape[2]
        rows = [F.pad(t, (0, 0, 0, -m % self.block)).unflatten(2, (-1, self.block)) for t in (q, k, v)]
        keys, values, inner = _running(*(t.transpose(2, 3) for t in rows))
        found = [(keys.transpose(2, 3), values.transpose(2, 3), inner)]
        if self.partition == "mixture":
            right = _running(*(t.flip(3) for t in rows))
            found += [_running(*rows), (right[0].flip(3), right[1].flip(3), right[2].flip(3, 4))]
        keys, values = (torch.cat([part[side].flatten(2, 3) for part in found], 2) for side in (0, 1))
        if not spread:
            return _Regions(keys, values, None)
        full = []
        for rule, (_, _, shares) in zip(("bhust,uw->bhsutw", *["bhsuw,st->bhsutw"] * 2), found, strict=False):
            own = torch.eye(shares.shape[2], dtype=shares.dtype, device=k.device)
            full.append(torch.einsum(rule, shares, own).flatten(4, 5).flatten(2, 3)[..., :m])
        return _Regions(keys, values, torch.cat(full, 2))


def _running(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each line, the summaries of its first token, its first two, ..: q, k, v [b, h, lines, length, d] -> keys and
    values alike, and the shares of its tokens [b, h, lines, length, length]."""
    past = torch.ones(k.shape[3], k.shape[3], dtype=torch.bool, device=k.device).tril()
    inner = masked_softmax(q.cummax(3).values @ k.mT, past)
    return k.cummax(3).values, inner @ v, inner


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [b, h, m, d], index [b, r] -> [b, h, r, d]."""
    return rows.gather(2, index[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def _levels(m: int) -> tuple[int, list[int]]:
    """How many bits a place below m has, at least one, and where the runs of each length start among all of them."""
    levels = max((m - 1).bit_length(), 1)
    sizes = [-(-m // (1 << level)) for level in range(levels)]
    return levels, [sum(sizes[:level]) for level in range(levels)]


def _run_regions(q: Tensor, k: Tensor, v: Tensor, length: int, count: Tensor, spread: bool) -> _Regions:
    m = k.shape[2]
    q, k, v = (F.pad(t, (0, 0, 0, -m % length)).unflatten(2, (-1, length)) for t in (q, k, v))
    real = (torch.arange(k.shape[2] * length, device=k.device) < count[:, None]).unflatten(1, (-1, length))[:, None]
    low = torch.finfo(k.dtype).min
    asking, keys = (t.masked_fill(~real[..., None], low).amax(3) for t in (q, k))
    filled = real.any(-1)[..., None]
    asking, keys = asking.masked_fill(~filled, 0.0), keys.masked_fill(~filled, 0.0)
    inner = masked_softmax((k @ asking[..., None]).squeeze(-1), real.expand(k.shape[0], k.shape[1], -1, -1))
    values = (inner[..., None, :] @ v).squeeze(-2)
    if not spread:
        return _Regions(keys, values, None)
    own = torch.eye(k.shape[2], dtype=inner.dtype, device=k.device)
    return _Regions(keys, values, torch.einsum("bhsl,st->bhstl", inner, own).flatten(3, 4)[..., :m])
