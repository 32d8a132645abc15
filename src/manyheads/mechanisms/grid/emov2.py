"""The improved inverted residual block of EMOv2."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, convolve, shown
from manyheads.functional.grid_extents import over_extents
from manyheads.functional.grid_windows import attend_windows, blocks, spread, windows_of
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class EMOv2(Mechanism):
    """i2RMB: window attention near and far with one query, key and expanded value, then a convolution, in one residual.

        z = BN or LN(x);  [q, k] = W z;  v = act(W_v z), expansion times as wide
        o = A_near v + A_far v,  each softmax(q k^T / sqrt(d)) within its windows of window x window cells
        o = o + silu(BN(conv(o)));  y = x + scale * W_o o

    near: squares of neighbours; far: cells spread over the map, ceil(side / window) apart. operator: "both", "far" (as
    in EMO), "near", or "none", which leaves o = v. window=0: the whole map. early: BN and SiLU in place of LN and GELU,
    as in the first two stages. With a stride of 2, or features other than dim, the block has neither of the two skips.
    scale begins at 1e-6. The mechanism is the whole block; x: [b, height, width, dim] -> [b, .., .., features]. Weights
    are summed over near and far, so that rows sum to 2; none for "none" or stride 2.

    Source: Zhang et al., EMOv2: Pushing 5M Vision Model Frontier, arXiv:2412.06674. Windows at the rim attend to the
    real cells that they have; the released code fills up with zeros, which are keys (of its biases) there. Its way of
    mixing inputs in front of W_v, which no published model takes, puts results of near windows at far places, and is
    left out.
    Weights: norm (norm.norm of an LN), eops.0.qk.conv, eops.0.v.conv (eops.0.net.conv of "none"), conv_local.conv,
    .norm, proj.conv, ls.gamma are norm, qk, value, conv, norm_conv, project, scale; kernels of 1 x 1 lose their last
    two axes. qk holds q of all heads, then k.
    """

    card = Card(
        name="emov2",
        title="EMOv2: Pushing 5M Vision Model Frontier",
        reference="arXiv:2412.06674",
        family=Family.GRID,
        patterns={"grid"},
        time="n window^2",
        state="",
        decodes=False,
        example={"window": 3, "expansion": 2.0, "kernel": 3},
        resizes="1 / stride",
        notes="A block of its own, with norms and one residual; its values are what the hidden units of an MLP are "
        "elsewhere.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        features: int | None = None,
        stride: int = 1,
        operator: Literal["both", "far", "near", "none"] = "both",
        window: int = 7,
        expansion: float = 4.0,
        kernel: int = 5,
        early: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim, wide = self._split_heads(), int(dim * expansion)
        size = self.result_dim = dim if features is None else features
        odd = kernel % 2 == 1 and kernel > 0
        if wide < 1 or wide % heads or stride not in (1, 2) or window < 0 or size < 1 or not odd:
            raise ValueError(
                f"{self.card.name}: expansion={expansion} (values of {wide} features), stride={stride}, "
                f"window={window}, features={size}, kernel={kernel}; want values divisible by heads={heads}, a stride "
                "of 1 or 2, window >= 0 and an odd kernel"
            )
        self.stride, self.operator, self.window, self.early = stride, operator, window, early
        self.skips = stride == 1 and size == dim
        self.norm = CellNorm(dim, eps=1e-6) if early else nn.LayerNorm(dim, eps=1e-6)
        self.act = nn.SiLU() if early else nn.GELU()
        self.qk = nn.Linear(dim, 2 * dim) if operator != "none" else None
        self.value, self.project = nn.Linear(dim, wide), nn.Linear(wide, size, bias=False)
        self.conv = nn.Conv2d(wide, wide, kernel, stride=stride, padding=kernel // 2, groups=wide, bias=False)
        self.norm_conv, self.scale = CellNorm(wide, eps=1e-6), nn.Parameter(torch.full((size,), 1e-6))

    def result_size(self, *size: Any) -> Any:
        return tuple(-(-side // self.stride) for side in size)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real, need = call.padding, call.need_weights and self.stride == 1
        given = shown(x, real)
        z = shown(self.norm(given, real) if self.early else self.norm(given), real)
        if self.qk is None:
            o, weights = self.act(self.value(z)), None
        else:
            o, weights = over_extents(z, real, lambda part, seen: self._mixed(part, seen, need))
        after = real
        if real is not None and self.stride == 2:
            after = F.pad(real, (0, real.shape[2] % 2, 0, real.shape[1] % 2))[:, ::2, ::2]
        local = F.silu(self.norm_conv(convolve(self.conv, o, real), after))
        y = self.scale.to(x.dtype) * self.project(o + local if self.skips else local)
        return Result(x + y if self.skips else y, weights)

    def _mixed(self, z: Tensor, real: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        assert self.qk is not None
        sizes, cells = z.shape[1:3], z.flatten(1, 2)
        seen = None if real is None else real.flatten(1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (*self.qk(cells).chunk(2, -1), self.act(self.value(cells)))
        )
        total: Tensor | None = None
        whole: Tensor | None = None
        for name, lay in (("near", blocks), ("far", spread)):
            if self.operator in (name, "both"):
                layout = [lay(size, self.window or size) for size in sizes]
                mixed, weights = attend_windows(
                    q,
                    k,
                    v,
                    windows_of(layout, sizes, device=z.device),
                    scale=self.head_dim**-0.5,
                    real=seen,
                    need_weights=need_weights,
                )
                total = mixed if total is None else total + mixed
                whole = weights if whole is None or weights is None else whole + weights
        assert total is not None
        return total.transpose(1, 2).flatten(2).unflatten(1, tuple(sizes)), whole
