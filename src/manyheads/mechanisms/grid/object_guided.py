"""Object-guided attention, of CoT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, convolve
from manyheads.functional.feature_maps import cell_mean
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class ObjectGuided(Mechanism):
    """An object's vector says which features of a picture show its attributes, and where.

        s = sigmoid(W_2 relu(W_1 [o ; mean x])),   r = s x                        per feature
        a = sigmoid(norm(conv3x3([mean o ; mean r])))                             per cell, means over features
        y = x + a r

    x: [b, height, width, dim]; context: o as [b, 1, source_dim] (of several tokens the mean of the real ones). The
    mean of o is the same in every cell: it moves a as a whole, and is seen at the border. Norm: batch norm.

    Source: Kim et al., Hierarchical Visual Primitive Experts for Compositional Zero-Shot Learning, arXiv:2308.04016,
    and its released models/cot.py, where this stands behind blocks 3, 6 and 9 of a vision transformer and the means of
    the three y together give the attribute.
    Weights: mlp_i.0 and mlp_i.2 are wide and narrow, conv_i.conv and conv_i.bn conv and norm.
    """

    card = Card(
        name="object-guided",
        title="Hierarchical Visual Primitive Experts for Compositional Zero-Shot Learning",
        reference="arXiv:2308.04016",
        family=Family.GRID,
        patterns={"grid-cross"},
        time="n",
        state="",
        decodes=False,
        notes="The context is one vector, the object's; heads are not used.",
    )

    def __init__(self, dim: int, heads: int = 1, *, causal: bool = False, source_dim: int | None = None) -> None:
        super().__init__(dim, heads, causal=causal)
        self.source_dim = dim if source_dim is None else source_dim
        if self.source_dim < 1:
            raise ValueError(f"object-guided: source_dim={source_dim}; want an integer >= 1")
        hidden = self.source_dim + dim // 16
        self.wide, self.narrow = nn.Linear(self.source_dim + dim, hidden), nn.Linear(hidden, dim)
        self.conv, self.norm = nn.Conv2d(2, 1, 3, padding=1, bias=False), CellNorm(1, momentum=0.01)

    def attend(self, x: Tensor, context: Tensor, call: Call) -> Result:
        guide = cell_mean(context, call.padding)
        features = torch.sigmoid(self.narrow(F.relu(self.wide(torch.cat([guide, x.mean((1, 2))], -1)))))
        chosen = x * features[:, None, None]
        flat = guide.mean(-1)[:, None, None, None].expand(*x.shape[:-1], 1)
        places = self.norm(convolve(self.conv, torch.cat([flat, chosen.mean(-1, keepdim=True)], -1)))
        return Result(x + chosen * torch.sigmoid(places))
