"""Dual attention at the bottom of AGUNet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, convolve, shown
from manyheads.functional.dual_attention import narrow_width, over_features, over_positions
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


class _Branch(nn.Module):
    """gamma z + x, then conv3 - norm - relu - dropout - conv3, where z comes from an attention of some kind."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(()))
        self.first, self.second = (nn.Conv3d(dim, dim, 3, padding=1) for _ in range(2))
        self.norm, self.dropout = CellNorm(dim), nn.Dropout3d(dropout)

    def forward(self, x: Tensor, attended: Tensor, real: Tensor | None) -> Tensor:
        h = F.relu(self.norm(convolve(self.first, self.gamma * attended + x, real), real))
        return convolve(self.second, convolve(self.dropout, h), real)


@register
class AGUNet(Mechanism):
    """Every voxel attends to all voxels, and every feature to all features; the two are convolve and summed.

        position: P = softmax(q k^T) v          no scale, no biases, q and k of dim / 8 features
        features: C = X softmax(X^T X)          over rows: the input feature
        y = norm(W (f_P(gamma_P P + x) + f_C(gamma_C C + x)) + b),  f = conv3 - norm - relu - dropout - conv3

    x: [b, depth, height, width, dim]; X is x as cells x dim. gammas begin at 0. heads: of the position attention, 1 in
    the paper. dropout: of whole features, in f and on the sum. Norms: batch norm, over real cells. Matrix: P's, [b,
    heads, cells, cells]; without asking for them no such matrix is made.

    Source: Bouget et al., Meningioma Segmentation in T1-Weighted MRI Leveraging Global Context and Attention
    Mechanisms, arXiv:2101.07715, and its released DualAttentionUNet.py. Its feature attention weighs alike features
    most and multiplies from the right, where DANet weighs unlike ones from the left. What is not here: the guided form
    upsamples y to every level of the decoder, and the gated form has `attention-gate` with axes=3 on its skips.
    Weights: PAM's three 1x1x1 kernels are k, q, v_proj in their order; then gamma and both convolutions of each branch.
    """

    card = Card(
        name="agunet",
        title="Meningioma Segmentation in T1-Weighted MRI Leveraging Global Context and Attention Mechanisms",
        reference="arXiv:2101.07715",
        family=Family.GRID,
        patterns={"volume"},
        time="n^2",
        state="",
        decodes=False,
        notes="For the smallest map of a U-Net over volumes: time grows with the square of its voxels.",
    )

    def __init__(self, dim: int, heads: int = 1, *, causal: bool = False, dropout: float = 0.5) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        if not 0 <= dropout < 1:
            raise ValueError(f"agunet: dropout={dropout}; want 0 <= dropout < 1")
        narrow = narrow_width(dim, heads)
        self.q_proj, self.k_proj = (nn.Linear(dim, narrow, bias=False) for _ in range(2))
        self.v_proj, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.position, self.features = _Branch(dim, dropout), _Branch(dim, dropout)
        self.norm, self.dropout = CellNorm(dim), nn.Dropout3d(dropout)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real = call.padding
        x = shown(x, real)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        attended, weights = over_positions(q, k, v, real, self.heads, call.need_weights)
        both = self.position(x, attended, real) + self.features(x, over_features(x), real)
        output: Tensor = self.norm(self.out(convolve(self.dropout, both)), real)
        return Result(output, weights)
