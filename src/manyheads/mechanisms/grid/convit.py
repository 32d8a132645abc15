"""Gated positional self attention, of ConViT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import shown
from manyheads.functional.grouped import grouped_scores, masked_softmax
from manyheads.functional.multihead import Heads, key_mask
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class ConViT(Mechanism):
    """Each head has a gate between what cells hold and where they stand; it begins as a convolution and may leave that.

        A = (1 - s) softmax(q k^T / sqrt(d)) + s softmax(W [dx, dy, dx^2 + dy^2] + b),  s = sigmoid(gate of the head)

    dx, dy: columns and rows from the query to the key. At the start gate = 1 (s = 0.73), values are the cells
    themselves, and head c + k r, k = int(sqrt(heads)), looks locality times as sharply as softmax(-distance^2) to the
    cell (c, r) of a k x k kernel; heads beyond k^2 look at random. x: [b, height, width, dim], of any size; padded
    cells are no keys in either softmax.

    Source: d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases,
    arXiv:2103.10697. The released code divides A by its row sums once more, which are one. Its class token, which joins
    behind these layers, is no cell of a grid.
    Weights: qk is attention.q_proj and .k_proj, v is .v_proj, proj is .o_proj; pos_proj is positions, gating_param is
    gate.
    """

    card = Card(
        name="convit",
        title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
        reference="arXiv:2103.10697",
        family=Family.GRID,
        patterns={"grid"},
        time="n^2",
        state="",
        decodes=False,
        notes="Begins as a convolution of sqrt(heads) x sqrt(heads), for little data.",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, locality: float = 1.0, bias: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.attention = Heads(dim, heads, bias)
        if not bias:  # the output has one in any case
            self.attention.o_proj = nn.Linear(dim, dim)
        self.positions, self.gate = nn.Linear(3, heads), nn.Parameter(torch.ones(heads))
        self._look_around(locality)

    @torch.no_grad()
    def _look_around(self, locality: float) -> None:
        nn.init.eye_(self.attention.v_proj.weight)
        side = int(self.heads**0.5)
        middle = (side - 1) / 2 if side % 2 == 0 else side // 2
        for row in range(side):
            for column in range(side):
                offset = torch.tensor([2.0 * (column - middle), 2.0 * (row - middle), -1.0])
                self.positions.weight[column + side * row] = locality * offset

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        sizes, layer = x.shape[1:3], self.attention
        cells = shown(x, call.padding).flatten(1, 2)
        allowed = key_mask(None if call.padding is None else call.padding.flatten(1))
        k, v = layer.read(cells)
        q = layer.split(layer.q_proj(cells))
        where = masked_softmax(self._offsets(sizes, q)[None], allowed)
        gate = self.gate.sigmoid().to(q.dtype)[:, None, None]
        if call.need_weights:
            what = masked_softmax(grouped_scores(q * layer.scale, k), allowed)
            weights = (1 - gate) * what + gate * where
            return Result(layer.join(weights @ v).unflatten(1, tuple(sizes)), weights)
        mixed, _ = attend_weighted(q, k, v, allowed, scale=layer.scale, need_weights=False)
        mixed = (1 - gate) * mixed + gate * (where.to(v.dtype) @ v)
        return Result(layer.join(mixed).unflatten(1, tuple(sizes)))

    def _offsets(self, sizes: Any, like: Tensor) -> Tensor:
        """Scores of positions, [heads, n, n]."""
        height, width = sizes
        row, column = (torch.arange(size, device=like.device) for size in sizes)
        dy = (row[None, :] - row[:, None])[:, None, :, None].expand(height, width, height, width)
        dx = (column[None, :] - column[:, None])[None, :, None, :].expand(height, width, height, width)
        features = torch.stack([dx, dy, dx**2 + dy**2], -1).to(self.gate.dtype)
        scores: Tensor = self.positions(features.flatten(2, 3).flatten(0, 1))
        return scores.permute(2, 0, 1).to(like.dtype)
