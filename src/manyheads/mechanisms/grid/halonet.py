"""Blocked local attention with halos."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import shown
from manyheads.functional.grid_bias import OffsetLogits
from manyheads.functional.grid_windows import attend_windows, blocks, windows_of
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class HaloNet(Mechanism):
    """The cells of a block attend to the block and to a halo of cells around it, all of them to the same keys.

        y_i = sum_j softmax_j(q_i . k_j / sqrt(d) + q_i . (height_{row j - row i} + width_{column j - column i})) v_j
        over the (block + 2 halo)^2 places j around the block of i

    Places outside the map, and padded cells, are keys and values of zeros that keep their weight, as published models
    were trained; the weights returned are those on cells, so that rows at the rim sum to less than one. No projection
    behind the heads: a convolution follows in a HaloNet. x: [b, height, width, dim], of any size. stride: only every
    so-manieth cell of each axis asks, and the map gets smaller; offsets count cells that ask as if they were next to
    each other, as in timm.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv:2103.12731, in
    the form of timm, which leaves the q of the positions unscaled and wants sides divisible by the block; the paper's
    code is not released. (A widely used port masks the wrong places: in it the inner blocks see no scores at all.)
    Weights: q, kv are q_proj, k_proj and v_proj; pos_embed.height_rel, .width_rel are positions.height, .width. kv
    there holds keys and values of a head next to each other, here all keys stand first.
    """

    card = Card(
        name="halonet",
        title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        reference="arXiv:2103.12731",
        family=Family.GRID,
        patterns={"grid"},
        time="n (block + 2 halo)^2",
        state="",
        decodes=False,
        resizes="1 / stride",
        example={"block": 3, "halo": 1},
        notes="Neighbouring blocks share their halos, so that nothing is cut off at the edge of a block.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if block < 1 or halo < 0:
            raise ValueError(f"{self.card.name}: block={block}, halo={halo}; want block >= 1 and halo >= 0")
        if stride < 1 or block % stride:
            raise ValueError(f"{self.card.name}: stride={stride} in blocks of {block}; want a divisor of the block")
        self.block, self.halo, self.stride = block, halo, stride
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.positions = OffsetLogits(self.head_dim, block // stride, block + 2 * halo)

    def result_size(self, *size: Any) -> Any:
        return tuple(-(-own // self.stride) for own in size)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        sizes, real = tuple(x.shape[1:3]), call.padding
        axes = [blocks(size, self.block, halo=self.halo, stride=self.stride) for size in sizes]
        asking = self.result_size(*sizes)
        windows = windows_of(axes, asking, sizes, device=x.device)
        cells = shown(x, real)
        asks = cells if self.stride == 1 else cells[:, :: self.stride, :: self.stride]
        q, k, v = (
            layer(own.flatten(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, own in ((self.q_proj, asks), (self.k_proj, cells), (self.v_proj, cells))
        )
        if real is not None:  # a bias would make a key of what is none
            k, v = (part.masked_fill(~real.flatten(1)[:, None, :, None], 0.0) for part in (k, v))
        mixed, weights = attend_windows(
            q,
            k,
            v,
            windows,
            scale=self.head_dim**-0.5,
            bias=self.positions,
            zero_outside=True,
            need_weights=call.need_weights,
        )
        if weights is not None and real is not None:
            weights = weights.masked_fill(~real.flatten(1)[:, None, None], 0.0)
        return Result(mixed.transpose(1, 2).flatten(2).unflatten(1, asking), weights)
