"""InLine attention: injective linear attention with a local residual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grid_windows import within_windows
from manyheads.functional.linear import widen
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

TAPS = 9
# exp: as far as a product of two still fits into single precision.
MAPS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky-relu": F.leaky_relu,
    "exp": lambda x: (x / 5).clamp(max=30).exp(),
}


@register
class InLine(Mechanism):
    """Linear attention normalised by subtraction, so that different queries never get the same weights, and a local
    residual whose kernel the image itself predicts.

        out_i = sum_j w_ij v_j + sum over the 3 x 3 neighbours of r v,  w_ij = (s q_i . k_j - s q_i . mean(k) + 1) / n
        r = W_2 gelu(W_1 mean(x)) [channels, 9], both grouped by head, s = 1 / sqrt(d)

    No weight is divided by a sum, each row sums to one and weights can be negative. kernel: a map on q and k,
    "identity", "relu", "leaky-relu" or "exp" (of x / 5, as in the code). x: [b, height, width, dim], mask
    [b, height, width]; for a sequence [b, n, dim] the nine neighbours lie in a line. Weights are those of the first
    term.
    square: a grid is cut into windows of square x square cells, each a map of its own, as in the Swin form, whose
    shifted windows the code does not mask; there are no weights then. The PVT form with fewer keys cannot run as
    released; with all of them it is that of the whole map.
    Source: Han et al., Bridging the Divide, arXiv:2412.06590. The paper writes q . k - mean + 1 / n; the 1 / n on all
    of it and s are the released code's, whose class token, which the residual leaves out, is not here. In the code r is
    predicted before the projection, as here. Padding enters neither mean nor the neighbours.
    Weights: the code's qkv is q, k, v in this order; residual.0 and residual.2 are near_in and near_out.
    """

    card = Card(
        name="inline",
        title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        reference="arXiv:2412.06590",
        family=Family.LINEAR,
        patterns={"noncausal-self", "grid"},
        time="n",
        state="",
        decodes=False,
        notes="Means over all tokens, so that dense masks are refused and nothing is decoded step by step.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        kernel: str = "identity",
        square: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if kernel not in MAPS:
            raise ValueError(f"{self.card.name}: kernel={kernel!r}; want one of {list(MAPS)}")
        if square is not None and square < 1:
            raise ValueError(f"{self.card.name}: square={square}; want windows of at least one cell, or None")
        self.kernel, self.square = kernel, square
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.near_in = nn.Conv1d(dim, dim, 1, groups=heads)
        self.near_out = nn.Conv1d(dim, TAPS * dim, 1, groups=heads)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"inline: a dense mask of shape {tuple(call.dense.shape)} was given, but weights are relative to means "
                "over all tokens; give key padding as the mask"
            )
        if self.square is None:
            return self._whole(x, call.padding, call.need_weights)
        if x.ndim != 4:
            raise ValueError(f"{self.card.name}: x has shape {tuple(x.shape)}; built with square, it wants a grid")
        return Result(within_windows(x, call.padding, self.square, lambda t, real: self._whole(t, real, False).output))

    def _whole(self, x: Tensor, padding: Tensor | None, need_weights: bool) -> Result:
        rows = x.flatten(1, -2)
        real = None if padding is None else padding.flatten(1)[..., None]
        there = torch.ones_like(rows[..., :1], dtype=torch.bool) if real is None else real
        share = 1 / there.sum(1, keepdim=True).clamp(min=1).to(torch.promote_types(x.dtype, torch.float32))
        here = rows if real is None else rows.masked_fill(~real, 0.0)
        mean = (widen(here).sum(1) * share[:, 0]).to(x.dtype)
        v = self.v_proj(rows)
        v = v if real is None else v.masked_fill(~real, 0.0)
        mixed, weights = self._far(rows, v, real, share, need_weights)
        mixed = mixed + self._near(v.view(x.shape), mean).flatten(1, -2)
        return Result(self.o_proj(mixed).view(x.shape), weights)

    def _far(
        self, x: Tensor, v: Tensor, real: Tensor | None, share: Tensor, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x, v [b, n, e], real [b, n, 1], share [b, 1, 1] = 1 / n -> [b, n, e] and the weights [b, h, n, n]."""
        phi = MAPS[self.kernel]
        q, k = (phi(widen(p(x))).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        k = k if real is None else k.masked_fill(~real[:, None], 0.0)
        values = widen(v).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, share = q * self.head_dim**-0.5, share[..., None]
        # The mean goes from the keys first: what is left of q . k is small, and so is its rounding.
        k = k - k.sum(2, keepdim=True) * share
        k = k if real is None else k.masked_fill(~real[:, None], 0.0)
        mixed = q @ (k.mT @ values * share) + values.sum(2, keepdim=True) * share
        weights = None
        if need_weights:
            weights = (q @ k.mT + 1) * share
            weights = (weights if real is None else weights.masked_fill(~real[:, None].mT, 0.0)).to(x.dtype)
        return mixed.transpose(1, 2).flatten(-2).to(x.dtype), weights

    def _near(self, v: Tensor, mean: Tensor) -> Tensor:
        """v [b, (height, width) or n, e] with the kernels that mean [b, e] predicts, one per row and channel."""
        kernels = self.near_out(F.gelu(self.near_in(mean[..., None]))).view(-1, 1, TAPS)
        planes = v.movedim(-1, 1).flatten(0, 1)[None]
        if v.ndim == 4:
            near = F.conv2d(planes, kernels.unflatten(-1, (3, 3)), padding=1, groups=planes.shape[1])
        else:
            near = F.conv1d(planes, kernels, padding=TAPS // 2, groups=planes.shape[1])
        return near.unflatten(1, (v.shape[0], -1))[0].movedim(1, -1)
