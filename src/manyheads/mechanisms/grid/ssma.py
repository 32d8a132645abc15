"""Self-supervised model adaptation: fusing the maps of two modalities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, convolve
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class SSMA(Mechanism):
    """Two maps of one place are weighed feature by feature, each by what both show around it, and joined.

        x = [a ; b],  g = sigmoid(conv3x3(relu(conv3x3(x))))  with 2 dim / reduction features between
        y = norm(W (g x))

    Maps: a, b [b, height, width, dim] of one size. The gates see both maps, so that either can silence the other. A
    cell that is padded in either of them is padded in both. Norm: batch norm, over real cells.

    skip: the released code fuses the two higher-resolution skips by conv3x3(g x) with a bias and no norm instead of
    the last line (with 6 as reduction, 48 features); the paper shows one design. There the decoder also multiplies
    these by a pooled vector, which is no part of this.

    Source: Valada, Mohan, Burgard, Self-Supervised Model Adaptation for Multimodal Semantic Segmentation,
    arXiv:1808.03833, and its released models/SSMA.py.
    Weights: conv511 (513, 518) is narrow, conv512 (514, 519) wide, conv515 (552, 553) out; TensorFlow's kernels
    [h, w, in, out] become [out, in, h, w], and out without its axes of length 1.
    """

    card = Card(
        name="ssma",
        title="Self-Supervised Model Adaptation for Multimodal Semantic Segmentation",
        reference="arXiv:1808.03833",
        family=Family.GRID,
        patterns={"maps"},
        time="n",
        state="",
        decodes=False,
        example={"reduction": 4},
        notes="Fuses two maps of one size; heads are not used.",
    )

    def __init__(
        self, dim: int, heads: int = 1, *, causal: bool = False, reduction: int = 16, skip: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if reduction < 1 or 2 * dim < reduction:
            raise ValueError(f"ssma: reduction={reduction}; want 1 to {2 * dim} for dim={dim}")
        self.map_dims = (dim, dim)
        self.narrow = nn.Conv2d(2 * dim, 2 * dim // reduction, 3, padding=1)
        self.wide = nn.Conv2d(2 * dim // reduction, 2 * dim, 3, padding=1)
        self.out = nn.Conv2d(2 * dim, dim, 3, padding=1) if skip else nn.Linear(2 * dim, dim, bias=False)
        self.norm = None if skip else CellNorm(dim)

    def result_size(self, *size: Any) -> Any:
        return size[0]

    def map_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        return ((height, width),) * 2

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        a, b = x
        if a.shape != b.shape:
            raise ValueError(f"ssma: maps of {list(a.shape)} and {list(b.shape)}; want two of one size")
        real = None if call.padding is None else call.padding[0] & call.padding[1]
        both = torch.cat([a, b], -1)
        gates = torch.sigmoid(convolve(self.wide, F.relu(convolve(self.narrow, both, real)), real))
        if self.norm is None:
            return Result(convolve(self.out, gates * both, real))
        joined: Tensor = self.norm(self.out(gates * both), real)
        return Result(joined)
