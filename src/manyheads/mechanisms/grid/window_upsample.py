"""Upsampling by attention of a fine map to a coarse one, within windows."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grid_windows import Windows, attend_windows, blocks, windows_of
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class WindowUpsample(Mechanism):
    """A fine map of an earlier layer asks, a coarse map of a deeper layer answers, and what comes is at the fine cells.

        y = W_o softmax(q(s) k(z)^T / sqrt(d)) v(z) + bilinear(W z), within windows of window x window fine cells and
        the window / 2 x window / 2 coarse cells below them

    x: two maps, s [b, height, width, dim] and z [b, ceil(height / 2), ceil(width / 2), coarse]; -> [b, height, width,
    dim]. Padded coarse cells are no keys, and bilinear leaves them out of its means. Matrix: [b, heads, fine cells,
    coarse cells].

    Source: Li, Cai, Gao, Li, Hu, More than Encoder: Introducing Transformer Decoder to Upsample, arXiv:2106.10637. Only
    what its abstract states is here: who asks whom, the windows, and the bilinear residual. What else its decoder holds
    (norms, attention of the fine map to itself, MLP, positions) is left out, as no code was released; W, and
    projections with a bias, are choices made here.
    """

    card = Card(
        name="window-upsample",
        title="More than Encoder: Introducing Transformer Decoder to Upsample",
        reference="arXiv:2106.10637",
        family=Family.GRID,
        patterns={"maps"},
        time="n window^2",
        state="",
        decodes=False,
        notes="Two maps, a fine one and one of half its height and width. The attention of the paper's decoder and its "
        "residual, without what else the decoder holds.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        coarse: int | None = None,
        window: int = 4,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim, wide = self._split_heads(), 2 * dim if coarse is None else coarse
        if window < 2 or window % 2 or wide < 1:
            raise ValueError(
                f"{self.card.name}: window={window}, coarse={wide}; want an even window, of which a coarse cell covers "
                "2 x 2 cells, and coarse >= 1"
            )
        self.window, self.map_dims = window, (dim, wide)
        self.q_proj, self.o_proj = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.k_proj, self.v_proj, self.skip = (nn.Linear(wide, dim, bias=bias) for _ in range(3))

    def result_size(self, *size: Any) -> Any:
        return size[0]

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        fine, coarse = x
        sizes, half = fine.shape[1:3], coarse.shape[1:3]
        if tuple(half) != tuple((size + 1) // 2 for size in sizes):
            raise ValueError(
                f"{self.card.name}: maps of {tuple(sizes)} and {tuple(half)} cells; want the second of half the height "
                f"and width, rounded up: {tuple((size + 1) // 2 for size in sizes)}"
            )
        real = None if call.padding is None else call.padding[1]
        layout = [
            (blocks(size, self.window), blocks(below, self.window // 2))
            for size, below in zip(sizes, half, strict=True)
        ]
        asking, asked = (
            windows_of([pair[i] for pair in layout], s, device=fine.device) for i, s in enumerate((sizes, half))
        )
        q, k, v = (
            layer(source.flatten(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.q_proj, fine), (self.k_proj, coarse), (self.v_proj, coarse))
        )
        mixed, weights = attend_windows(
            q,
            k,
            v,
            Windows(asking.queries, asked.keys),
            scale=self.head_dim**-0.5,
            real=None if real is None else real.flatten(1),
            need_weights=call.need_weights,
        )
        output = self.o_proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, tuple(sizes))
        return Result(output + self._bilinear(self.skip(coarse), real, sizes), weights)

    def _bilinear(self, z: Tensor, real: Tensor | None, sizes: Any) -> Tensor:
        """z at the places of the fine cells, between real coarse cells only."""
        height, width = sizes

        def twice(t: Tensor) -> Tensor:
            larger = F.interpolate(t.movedim(-1, 1), scale_factor=2, mode="bilinear", align_corners=False)
            return larger.movedim(1, -1)[:, :height, :width]

        if real is None:
            return twice(z)
        there = real[..., None].to(z.dtype)
        share = twice(there)
        return twice(z * there) / share.masked_fill(share == 0, 1.0)
