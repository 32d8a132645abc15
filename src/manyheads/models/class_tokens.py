"""A class token that reads the last map of a hierarchy.

token moves alone (CaiT, VOLO):  c = c + A(LN c, LN [c ; x]),  c = c + mlp(LN c)
all move (ViT, ConViT):          the same for every row of [c ; x]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from manyheads.functional.cells import FeedForward, cell_mean, shown
from manyheads.functional.multihead import Heads, key_mask


class TokenBlock(GradientCheckpointingLayer):
    """rows [b, 1 + n, e], the token first -> the same, only the token changed unless all move."""

    def __init__(self, dim: int, eps: float, settings: Mapping[str, Any]) -> None:
        super().__init__()
        heads = settings["heads"]
        if dim % heads:
            raise ValueError(f"head.token.heads={heads}; want a divisor of the {dim} features of the last map")
        self.all_move = settings["moves"] == "all"
        self.norm, self.norm_mlp = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attention = Heads(dim, heads, settings["bias"])
        self.attention.o_proj = nn.Linear(dim, dim)  # which has a bias in any case
        self.mlp = FeedForward(dim, int(dim * settings["mlp_ratio"]))

    def forward(self, rows: Tensor, allowed: Tensor | None) -> Tensor:
        moved, normed = rows if self.all_move else rows[:, :1], self.norm(rows)
        mixed, _ = self.attention(normed[:, : moved.shape[1]], *self.attention.read(normed), allowed, False)
        moved = moved + mixed
        moved = moved + self.mlp(self.norm_mlp(moved))
        return torch.cat([moved, rows[:, moved.shape[1] :]], 1)


class ClassToken(nn.Module):
    """A vector that is learnt, or the mean of the cells, and the blocks in which it reads them."""

    def __init__(self, dim: int, eps: float, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(1, 1, dim)) if settings["begins"] == "learnt" else None
        if self.start is not None:
            nn.init.trunc_normal_(self.start, std=0.02)
        self.blocks = nn.ModuleList(TokenBlock(dim, eps, settings) for _ in range(settings["depth"]))

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [b, height, width, e] -> the token, [b, e], and the cells after the blocks."""
        start = cell_mean(x, real)[:, 0] if self.start is None else self.start.to(x.dtype).expand(len(x), -1, -1)
        rows = torch.cat([start, shown(x, real).flatten(1, 2)], 1)
        allowed = None
        if real is not None:
            allowed = key_mask(torch.cat([real.new_ones(len(x), 1), real.flatten(1)], 1))
        for block in self.blocks:
            rows = block(rows, allowed)
        return rows[:, 0], rows[:, 1:].unflatten(1, tuple(x.shape[1:3]))
