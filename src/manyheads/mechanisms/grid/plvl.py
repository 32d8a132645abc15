"""Progressive language-guided visual learning: its block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.multihead import Heads, key_mask
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


def _places(table: Tensor, size: int) -> Tensor:
    """[size, size, d]: the vector of row i seen from row j, from a table of 2 side - 1 distances, resized to others."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


@register
class PLVL(Mechanism):
    """A block of a vision backbone that reads the words between seeing and thinking.

        x = x + attention(LN x),   x = x + cross(x, t),   x = x + W_2 gelu(W_1 LN x)
        t = n + U relu(D n),  n = LN(context)

    attention: over all cells, softmax(q k^T / sqrt(d) + q r_rows + q r_columns) v; r: learnt vectors of the distance
    along each axis, for maps of `side` x `side`, linearly resized for others; side=0: none. cross: queries are x as it
    is, without a norm. x: [b, height, width, dim]; context: words [b, m, dim]; the result is x, residuals included.
    Weights [b, cross_heads, cells, m]: those of cross. cross_heads: heads by default.

    Source: Progressive Language-guided Visual Learning for Multi-Task Visual Grounding, arXiv:2504.16145, and its
    released ViTDet_Dec.py: this is a global block (3, 6, 9 and 12 of a ViTDet); those between attend in windows and
    read no words. There t has a norm and an adapter (of 64 features) for each block, pads are not masked, 12 heads see
    and 8 read. Without dropout and stochastic depth.
    Weights: attn.qkv is q, k, v of attention in this order, rel_pos_h, rel_pos_w rows and columns, prompt_norms and
    prompt_blocks norm_words, down and up of the block's number.
    """

    card = Card(
        name="plvl",
        title="Progressive Language-guided Visual Learning for Multi-Task Visual Grounding",
        reference="arXiv:2504.16145",
        family=Family.GRID,
        patterns={"grid-cross"},
        time="n^2 + n m",
        state="",
        decodes=False,
        example={"side": 3, "adapter": 6},
        notes="A whole block with its residuals.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        cross_heads: int | None = None,
        adapter: int = 64,
        side: int = 14,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim, cross_heads = self._split_heads(), heads if cross_heads is None else cross_heads
        if cross_heads < 1 or dim % cross_heads or adapter < 1 or side < 0:
            raise ValueError(
                f"plvl: cross_heads={cross_heads}, adapter={adapter}, side={side}; want heads that divide dim={dim}, "
                "an adapter of at least 1 feature and a side of at least 0"
            )
        self.attention, self.cross = Heads(dim, heads, bias), Heads(dim, cross_heads, bias)
        self.norm, self.norm_mlp, self.norm_words = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.down, self.up = nn.Linear(dim, adapter), nn.Linear(adapter, dim)
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.rows, self.columns = (
            nn.Parameter(torch.zeros(2 * side - 1, self.head_dim)) if side else None for _ in range(2)
        )

    def attend(self, x: Tensor, context: Tensor, call: Call) -> Result:
        size, x = x.shape[1:3], x.flatten(1, 2)
        x = x + self._see(self.norm(x), size)
        words = self.norm_words(context)
        words = words + self.up(F.relu(self.down(words)))
        mixed, weights = self.cross(x, *self.cross.read(words), key_mask(call.padding), call.need_weights)
        x = x + mixed
        x = x + self.narrow(F.gelu(self.wide(self.norm_mlp(x))))
        return Result(x.unflatten(1, size), weights)

    def _see(self, x: Tensor, size: Any) -> Tensor:
        q, (k, v) = self.attention.split(self.attention.q_proj(x)), self.attention.read(x)
        scaled = q * self.head_dim**-0.5
        if self.rows is not None and self.columns is not None:
            # A number per row and per column of keys beside the features, picked by the key's own: no matrix of cells.
            grid = q.unflatten(2, size)
            rows = torch.einsum("bnhwd,hkd->bnhwk", grid, _places(self.rows, size[0]).to(q.dtype))
            columns = torch.einsum("bnhwd,wkd->bnhwk", grid, _places(self.columns, size[1]).to(q.dtype))
            scaled = torch.cat([scaled, *(t.flatten(2, 3).to(q.dtype) for t in (rows, columns))], -1)
            own = [torch.eye(s, dtype=k.dtype, device=k.device) for s in size]
            own = [own[0][:, None].expand(-1, size[1], -1), own[1].expand(size[0], -1, -1)]
            picks = torch.cat(own, -1).flatten(0, 1).expand(*k.shape[:3], -1)
            k = torch.cat([k, picks], -1)
        # As wide as the keys, without which the kernel would be one that makes the matrix.
        v = F.pad(v, (0, k.shape[-1] - self.head_dim))
        mixed, _ = attend_weighted(scaled, k, v, None, scale=1.0, need_weights=False)
        return self.attention.join(mixed[..., : self.head_dim])
