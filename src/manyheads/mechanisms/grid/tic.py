"""Multi-head self-attention convolution, of TiC."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import convolve, shown
from manyheads.functional.grid_windows import Windows, attend_windows, taps, windows_of
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class TiC(Mechanism):
    """Attention of every cell to its kernel x kernel window, moved as a convolution is, and a convolution behind it.

        o_p = sum over the taps t of the window of softmax_t(q_p . k_{p+t} / sqrt(d)) v_{p+t};  y = relu(conv(o + x))

    conv: as wide as the kernel, over all features, without a bias. dilation: cells from one tap of the window to the
    next. Places outside the map and padded cells are keys and values of zeros that keep their weight, as in a padded
    convolution, so that weights over cells sum to less than one at the rim. x: [b, height, width, dim].

    Source: Zhang et al., TiC: Exploring Vision Transformer in Convolution, arXiv:2310.04134, in the released form,
    which has one head. Its multi-directional shifts and pooling between windows are in the paper only, and left out.
    Weights: the convolution of 1 x 1 into q, k, v is q_proj, k_proj, v_proj in this order, the last one is conv.
    """

    card = Card(
        name="tic",
        title="TiC: Exploring Vision Transformer in Convolution",
        reference="arXiv:2310.04134",
        family=Family.GRID,
        patterns={"grid"},
        time="n kernel^2",
        state="",
        decodes=False,
        notes="Any image size, as a convolution. The output is positive: it ends in a ReLU.",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, kernel: int = 3, dilation: int = 1, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if kernel < 1 or kernel % 2 == 0 or dilation < 1:
            raise ValueError(
                f"{self.card.name}: kernel={kernel}, dilation={dilation}; want an odd kernel and dilation >= 1"
            )
        self.kernel, self.dilation = kernel, dilation
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, bias=False)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        sizes, real = x.shape[1:3], call.padding
        x = shown(x, real)
        axes = [taps(size, self.kernel, dilation=self.dilation) for size in sizes]
        keys = windows_of(axes, sizes, device=x.device).keys
        windows = Windows(torch.arange(len(keys), device=x.device)[:, None], keys)
        q, k, v = (
            shown(layer(x), real).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed, weights = attend_windows(
            q, k, v, windows, scale=self.head_dim**-0.5, zero_outside=True, need_weights=call.need_weights
        )
        o = mixed.transpose(1, 2).flatten(2).unflatten(1, tuple(sizes))
        if weights is not None and real is not None:
            weights = weights.masked_fill(~real.flatten(1)[:, None, None], 0.0)
        return Result(F.relu(convolve(self.conv, o + x, real)), weights)
