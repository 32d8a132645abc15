"""ULSAM, an attention map for each of a few subspaces of the channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, convolve, shown
from manyheads.functional.linear import widen
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class Ulsam(Mechanism):
    """Each group of channels weighs the cells of the map once, and adds what it weighed.

        a = softmax over cells of relu(BN(w . maxpool_3x3(relu(BN(s x + t)))));   y = x + a x

    per group of dim / heads channels: heads is the paper's g (4 for MobileNets). s, t: one factor and offset per
    channel, a depthwise 1 x 1 convolution; w: to one channel, with a bias. Weights belong to cells, so that there are
    none from cell to cell; `maps` gives a. The sum with x is inside.

    Source: Saini et al., ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks,
    arXiv:2006.15102, and the released ulsam.py: with relu before the softmax, biases, and a momentum of 0.9. The
    BatchNorms are over the real cells in training; padded cells have no weight, and are no maximum.
    Weights: group g of point and of both norms is the module of subspace g; conv_dws is depthwise.
    """

    card = Card(
        name="ulsam",
        title="ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
        reference="arXiv:2006.15102",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height width",
        state="",
        decodes=False,
        notes="for images; heads is the number of subspaces",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.depthwise = nn.Conv2d(dim, dim, 1, groups=dim)
        self.norm_in = CellNorm(dim, momentum=0.9)
        self.point = nn.Conv2d(dim, heads, 1, groups=heads)
        self.norm_out = CellNorm(heads, momentum=0.9)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        x = shown(x, call.padding)
        weights = self.maps(x, mask=call.padding)
        weighed = x.unflatten(-1, (self.heads, -1)) * weights[..., None]
        return Result(x + weighed.flatten(-2))

    def maps(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x [b, height, width, dim], mask [b, height, width] True = real -> a [b, height, width, heads], of which each
        head's sum over the cells is one."""
        lifted = F.relu(self.norm_in(convolve(self.depthwise, x, mask), mask))
        # After a relu zero is no maximum over a cell that is real.
        high = F.max_pool2d(shown(lifted, mask).movedim(-1, 1), 3, 1, 1)
        scores = F.relu(self.norm_out(self.point(high).movedim(1, -1), mask)).flatten(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask.flatten(1)[..., None], -torch.inf)
        weights = widen(scores).softmax(1)
        if mask is not None:
            weights = weights.masked_fill(~mask.any((1, 2))[:, None, None], 0.0)
        return weights.to(x.dtype).unflatten(1, x.shape[1:3])
