"""Music Transformer's relative attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, masked_softmax
from manyheads.functional.skew import skew, unskew
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where


@register
class MusicTransformer(SoftmaxAttention):
    """Keys have a learned vector for their distance behind the query, read off by skewing: memory n d, not n^2 d.

        softmax((q k^T + skew(q E^T)) / sqrt(d)) v,   E [heads, max_distance, d]; distances beyond it count as zero

    Not causal: E has 2 max_distance - 1 rows, from the farthest key ahead to the farthest behind. values: a vector for
    the distance, out of a table of the same size, is added to v_j too.
    block: the local form. Positions are cut into blocks; a query sees its own block so far and all of the block before,
    in blocks of queries, with time and memory n block. Without padding, masks, given positions or a state; these go
    through the [n, m] matrix under the same rule.
    Source: Huang et al., arXiv:1809.04281, and its code in tensor2tensor (`dot_product_self_attention_relative_v2`,
    `masked_relative_local_attention_1d`): both terms are scaled, tables differ by head and start at N(0, 1 / d), and
    what is farther than the table reaches is zero, not clipped. Distances are between places in the sequence.
    Weights: row r of each table is of distance r; the code's rows go the other way, its last one is of distance 0.
    """

    shares_kv = False
    card = Card(
        name="music-transformer",
        title="Music Transformer",
        reference="arXiv:1809.04281",
        family=Family.POSITION,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        example={"max_distance": 6},
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        max_distance: int = 512,
        block: int | None = None,
        values: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        if max_distance < 1 or (block is not None and block < 1):
            raise ValueError(f"music-transformer: max_distance={max_distance} and block={block} must be positive")
        if block is not None and not causal:
            raise ValueError(f"music-transformer: block={block} with causal=False; the local form looks back alone")
        self.max_distance, self.block = max_distance, block
        self.span = None if block is None else 2 * block
        size = heads, max_distance if causal else 2 * max_distance - 1, self.head_dim
        self.distances = nn.Parameter(torch.randn(size) * self.head_dim**-0.5)
        self.value_distances = nn.Parameter(torch.randn(size) * self.head_dim**-0.5) if values else None

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        q = q * self.scale
        return q @ k.transpose(-1, -2) + self._relative(q, k.shape[2])

    def select(self, q: Tensor, k: Tensor, where: Where) -> Tensor | None:
        allowed = where.allowed()
        if self.block is None:
            return allowed
        of_query, of_key = where.query_positions // self.block, where.key_positions // self.block
        near = (of_key[:, None, None] >= of_query[:, None, :, None] - 1) & (where.j <= where.i[:, None])
        return near if allowed is None else allowed & near

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        plain = where.padding is None and where.dense is None and where.square
        if self.block is None or not plain or q.shape[2] <= self.block:
            return None
        # Blocks are cut by position, so that left padding moves none of them; here positions must be places.
        if not torch.equal(where.query_positions, where.i[None].expand_as(where.query_positions)):
            return None
        return self._in_blocks(q, k, v, self.block)

    def mix(self, weights: Tensor, v: Tensor, where: Where) -> Tensor:
        return grouped_mix(weights, v) + self._relative_values(weights)

    def _relative(self, q: Tensor, m: int) -> Tensor:
        """q [b, h, n, d] or blocks of it [b, h, c, n, d] -> the term by distance, [.., n, m]."""
        table, behind, ahead = self._near(self.distances, m)
        by_distance = q @ (table if q.ndim == 4 else table[:, None]).transpose(-1, -2)
        return skew(F.pad(by_distance, (behind, ahead)), m)

    def _relative_values(self, weights: Tensor) -> Tensor | float:
        """weights [b, h, n, m] or [b, h, c, n, m] -> what the keys' distances add to their values, [.., n, d]."""
        if self.value_distances is None:
            return 0.0
        m = weights.shape[-1]
        table, behind, _ = self._near(self.value_distances, m)
        by_distance = unskew(weights, m)[..., behind : behind + table.shape[1]]
        return by_distance @ (table if weights.ndim == 4 else table[:, None])

    def _near(self, table: Tensor, m: int) -> tuple[Tensor, int, int]:
        """The rows of a table [h, ., d] for distances that m keys can have, the farthest behind first, and how many
        columns by distance lack a row on either side of them."""
        reach = min(m, self.max_distance)
        if self.causal:
            return table[:, :reach].flip(1), m - reach, 0
        here = self.max_distance - 1
        return table[:, here - reach + 1 : here + reach].flip(1), m - reach, m - reach

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        n = q.shape[2]
        q, k, v = (F.pad(t, (0, 0, 0, -n % block)).unflatten(2, (-1, block)) for t in (q * self.scale, k, v))
        # Each block of keys behind the one before it; before the first there are none.
        keys, values = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], 3) for t in (k, v))
        scores = q @ keys.transpose(-1, -2) + self._relative(q, 2 * block)
        j = torch.arange(2 * block, device=q.device) - block
        allowed = j <= torch.arange(block, device=q.device)[:, None]
        first = torch.arange(q.shape[2], device=q.device)[:, None, None] == 0
        weights = masked_softmax(scores, allowed & ~(first & (j < 0)))
        return (weights @ values + self._relative_values(weights)).flatten(2, 3)[:, :, :n]
