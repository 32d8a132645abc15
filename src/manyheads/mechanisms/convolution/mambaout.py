"""The gated CNN block of MambaOut."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import convolve, shown
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class MambaOut(Mechanism):
    """Mamba's block without its state-space model: a depthwise convolution of some of the values, and a gate.

        [g, i, v] = W_1 LN(x);   y = x + W_2 (GELU(g) * [i ; DWConv(v)])

    g has int(expansion dim) channels, and so have i and v together, of which v has int(conv_ratio dim): of the dim, not
    of the values, so that at the published ratio of 1 three in eight are convolve. kernel squared, published 7. The
    mechanism is the whole block, norm and residual included. heads has no meaning here and changes nothing. There are
    no weights from cell to cell.

    Source: Yu and Wang, MambaOut: Do We Really Need Mamba for Vision?, arXiv:2405.07992, and the released
    GatedCNNBlock: the gate is GELU (Mamba's is SiLU), LN has an epsilon of 1e-6. Padded cells read as zeros.
    Weights: norm, fc1, conv, fc2 have the released names and shapes.
    """

    card = Card(
        name="mambaout",
        title="MambaOut: Do We Really Need Mamba for Vision?",
        reference="arXiv:2405.07992",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height width",
        state="",
        decodes=False,
        example={"kernel": 3},
        notes="a block of its own: no MLP goes behind it; reaches as far as its kernel",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        kernel: int = 7,
        expansion: float = 8 / 3,
        conv_ratio: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        hidden, moved = int(expansion * dim), int(conv_ratio * dim)
        if kernel < 1 or kernel % 2 == 0 or not 1 <= moved <= hidden:
            raise ValueError(
                f"mambaout: kernel={kernel}, expansion={expansion:.3g}, conv_ratio={conv_ratio}: {moved} of {hidden} "
                "values would be convolve; want an odd kernel and at least one of them"
            )
        self.widths = (hidden, hidden - moved, moved)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.conv = nn.Conv2d(moved, moved, kernel, padding=kernel // 2, groups=moved, bias=bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        x = shown(x, call.padding)
        gate, kept, moved = self.fc1(self.norm(x)).split(self.widths, -1)
        values = torch.cat([kept, convolve(self.conv, moved, call.padding)], -1)
        return Result(x + self.fc2(F.gelu(gate) * values))
