"""SpectFormer: spectral gates in the first layers, attention in the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import shown
from manyheads.functional.linear import widen
from manyheads.functional.multihead import Heads, key_mask
from manyheads.functional.precision import own_dtype
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class SpectFormer(Mechanism):
    """The first alpha layers filter a map by a learned gate per frequency and channel, the layers behind them attend.

        layer < alpha:  y = irfft2(W * rfft2(x)), both orthonormal;      else softmax attention over all cells

    W: complex, [height, width // 2 + 1, dim], for a map of height x width. A map of another size is filtered by W
    interpolated bilinearly between its first and last frequency per axis, as the authors of GFNet do it; the released
    code refuses such maps. heads is that of the attention. A gate mixes no two channels, and has no weights from cell
    to cell.

    Source: Patro et al., SpectFormer: Frequency and Attention is what you need in a Vision Transformer,
    arXiv:2304.06446, and the released SpectralGatingNetwork, where alpha is 4 of 12 layers and the sizes hang on dim.
    There a spectral block has one residual around gate and MLP, an attention block the usual two. Of a padded map the
    part up to the last real row and column is transformed, padded cells in it being zeros.
    Weights: complex_weight has the released name and shape; of the attention, qkv is attention.q_proj, k_proj
    and v_proj in this order, and proj is attention.o_proj.
    """

    card = Card(
        name="spectformer",
        title="SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
        reference="arXiv:2304.06446",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height width log(height width), or (height width)^2 from layer alpha on",
        state="",
        decodes=False,
        example={"height": 9, "width": 10},
        notes="for images; a gate holds a number per frequency: maps of other sizes than its own get it interpolated",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        layer: int = 0,
        alpha: int = 4,
        height: int = 14,
        width: int = 14,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if layer < 0 or alpha < 0 or height < 1 or width < 1:
            raise ValueError(
                f"spectformer: layer={layer}, alpha={alpha}, height={height}, width={width}; want layers counted from "
                "0 and a map of at least one cell"
            )
        self.attention, self.complex_weight = None, None
        if layer < alpha:
            self.complex_weight = nn.Parameter(0.02 * torch.randn(height, width // 2 + 1, dim, 2))
        else:
            self._split_heads()
            self.attention = Heads(dim, heads, bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        x = shown(x, call.padding)
        if self.attention is not None:
            rows, real = x.flatten(1, 2), None if call.padding is None else call.padding.flatten(1)
            mixed, weights = self.attention(rows, *self.attention.read(rows), key_mask(real), call.need_weights)
            return Result(mixed.view(x.shape), weights)
        if call.padding is None:
            return Result(self._filtered(x))
        extents = torch.stack([_extent(call.padding.any(2)), _extent(call.padding.any(1))], 1)
        output = x * 0.0  # where nothing is real there is a gradient, of zero
        for height, width in extents.unique(dim=0).tolist():
            if height and width:
                same = (extents == extents.new_tensor([height, width])).all(1).nonzero()[:, 0]
                found = F.pad(self._filtered(x[same, :height, :width]), self._rim(x, height, width))
                output = output.index_copy(0, same, found)
        return Result(output)

    def _rim(self, x: Tensor, height: int, width: int) -> list[int]:
        return [0, 0, 0, x.shape[2] - width, 0, x.shape[1] - height]

    def _filtered(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        with own_dtype(x):  # half precision has no transform of these sizes
            found = torch.fft.rfft2(widen(x), dim=(1, 2), norm="ortho") * self._gate(height, width // 2 + 1)
            return torch.fft.irfft2(found, s=(height, width), dim=(1, 2), norm="ortho").to(x.dtype)

    def _gate(self, rows: int, columns: int) -> Tensor:
        """W for so many frequencies, [rows, columns, dim]."""
        assert self.complex_weight is not None
        weight = widen(self.complex_weight)
        if weight.shape[:2] != (rows, columns):
            planes = weight.flatten(2).permute(2, 0, 1)[None]
            planes = F.interpolate(planes, (rows, columns), mode="bilinear", align_corners=True)
            weight = planes[0].permute(1, 2, 0).unflatten(-1, (-1, 2))
        return torch.view_as_complex(weight.contiguous())


def _extent(used: Tensor) -> Tensor:
    """used [b, n] -> the place behind the last that is used, [b]."""
    return ((torch.arange(used.shape[1], device=used.device) + 1) * used).amax(1)
