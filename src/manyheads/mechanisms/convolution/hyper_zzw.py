"""HyperZZW, the operator of Terminator: over the whole map, and in a window."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.hyper_kernels import SlowNet, filter_each, pool_bins, standardise
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class HyperZZW(Mechanism):
    """Each row of an image weighs all rows: weights are the row itself times a kernel made of coordinates.

        y_hw = sum_v (K_hv z_hv) z'_vw,   z' = standardise(W_m z),   result W_o y

    per channel: the product of the maps K z and z' as matrices, so that every cell is reached at once and no two cells
    are compared. K comes from a network of the coordinates (multiplied sines), for maps of up to size x size: smaller
    ones read its corner, as if filled up with zeros; larger ones are refused. standardise: zero mean and unit variance
    per image and channel over the real cells. Head h is a group of dim / heads channels that share K; published:
    heads = dim. There is no matrix of weights that channels share.

    Source: Zhang, HyperZZW Operator Connects Slow-Fast Networks, arXiv:2401.17948, and the released HyperZZW_G,
    MAGNet_G and mixer branch. A local branch of the Terminator block is hyper-zzw-local.
    """

    card = Card(
        name="hyper-zzw",
        title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
        reference="arXiv:2401.17948",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height^2 width",
        state="",
        decodes=False,
        example={"size": 34, "hidden": 6},
        notes="for maps of up to size x size; the kernel is tied to places",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        size: int = 32,
        hidden: int = 16,
        layers: int = 3,
        omega: float = 10.0,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if size < 1 or hidden < 1 or layers < 1:
            raise ValueError(f"hyper-zzw: size={size}, hidden={hidden}, layers={layers}; want at least 1 of each")
        self.size = size
        self.slow = SlowNet(size, hidden, layers, heads, omega)
        self.mixer, self.out_proj = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        height, width = x.shape[1:3]
        if max(height, width) > self.size:
            raise ValueError(
                f"hyper-zzw: x has shape {tuple(x.shape)}; its kernel is made for {self.size} x {self.size} cells: "
                f"build it with size={max(height, width)} or more"
            )
        real = torch.ones_like(x[..., :1], dtype=torch.bool) if call.padding is None else call.padding[..., None]
        z = x.masked_fill(~real, 0.0)
        values = standardise(self.mixer(z), real)
        rows = self.slow()[:height, :width].repeat_interleave(self.head_dim, -1) * z
        both = min(height, width)  # beyond it one of the two maps is zero
        mixed = torch.einsum("bhve,bvwe->bhwe", rows[:, :, :both], values[:, :both])
        return Result(self.out_proj(mixed))


@register
class HyperZZWLocal(Mechanism):
    """An image makes the window that it is filtered with: a kernel of coordinates, scaled by the image seen small.

        y_i = GELU(standardise(W_c sum_o K_o z'_{i + o})) + b,   o: places of a window of size x size around i
        K = out h_l;  h_0 = sin(F_0 c),  h_l = s_l r(sin(F_l c) (L_l h_(l-1)) + p),  r(h) = h + h / (10 |h|)
        s_l = M_l GELU(W_2 W_1 pool z) per place,   z' = standardise(W_m z)

    pool: means of the real cells in size x size bins over the map, one per place of the window; |h|: over the places,
    per feature. Head h is a group of dim / heads channels that share K; published: heads = dim. Cells that are not real
    give zeros. There is no matrix of weights that channels share.
    Source: Zhang, arXiv:2401.17948, and the released MAGNet_L and LocalConv, as the branch whose window is 7 x 7. The
    code averages W_1 pool z over the batch, and standardises over it, so that images change each other: this is what it
    gives for a batch of one image. It cuts the gradient through the first h of r; here that is not cut.
    """

    card = Card(
        name="hyper-zzw-local",
        title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction (local branch)",
        reference="arXiv:2401.17948",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height width size^2",
        state="",
        decodes=False,
        example={"size": 3, "hidden": 6},
        notes="each image has one window for all of its cells; maps of any size",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        size: int = 7,
        hidden: int = 32,
        layers: int = 2,
        omega: float = 10.0,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if size < 1 or size % 2 == 0 or hidden < 1 or layers < 1:
            raise ValueError(
                f"hyper-zzw-local: size={size}, hidden={hidden}, layers={layers}; want size odd and at least 1 of each"
            )
        self.size = size
        self.slow = SlowNet(size, hidden, layers, heads, omega)
        self.reduce, self.seen_proj = nn.Linear(dim, hidden), nn.Linear(hidden, hidden)
        scales = [nn.Linear(hidden, hidden) for _ in range(layers)]
        for scale in scales:
            nn.init.ones_(scale.bias)
        self.scales = nn.ModuleList(scales)
        # What is standardised next needs no bias.
        self.mixer, self.channel_mixer = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.fast_bias = nn.Parameter(torch.zeros(1))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real = torch.ones_like(x[..., :1], dtype=torch.bool) if call.padding is None else call.padding[..., None]
        z = x.masked_fill(~real, 0.0)
        filtered = filter_each(standardise(self.mixer(z), real), self._windows(z, real))
        output = F.gelu(standardise(self.channel_mixer(filtered), real)) + self.fast_bias
        return Result(output.masked_fill(~real, 0.0))

    def _windows(self, z: Tensor, real: Tensor) -> Tensor:
        """K of each image, [b, size, size, heads]."""
        seen = F.gelu(self.seen_proj(self.reduce(pool_bins(z, real, self.size))))
        return self.slow([scale(seen) for scale in self.scales])
