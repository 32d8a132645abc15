"""Spatially separable attention, of Twins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import convolve, shown
from manyheads.functional.grid_windows import attend_cells, blocks, windows_of
from manyheads.functional.multihead import Heads
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

_REFERENCE = "arXiv:2104.13840"


def _positive(name: str, **values: int) -> None:
    wrong = {key: value for key, value in values.items() if value < 1}
    if wrong:
        raise ValueError(f"{name}: {wrong}; want integers >= 1")


@register
class TwinsLocal(Mechanism):
    """Locally-grouped self attention: softmax(q k^T / sqrt(d)) v among the cells of each window x window square.

    Half of spatially separable attention; twins-global is the other. No positions, no shift. x: [b, height, width,
    dim]. Squares at the rim attend to the cells that they have; the released code wants sides divisible by the window,
    the one in timm fills up with zeros that take weight. Only the attention: norms, residual and MLP stand around it.

    Source: Chu et al., Twins: Revisiting the Design of Spatial Attention in Vision Transformers, arXiv:2104.13840.
    Weights: qkv is q_proj, k_proj, v_proj in this order; proj is o_proj.
    """

    card = Card(
        name="twins-local",
        title="Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
        reference=_REFERENCE,
        family=Family.GRID,
        patterns={"grid"},
        time="n window^2",
        state="",
        decodes=False,
        example={"window": 5},
        notes="Squares do not exchange anything: put twins-global between the layers.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, window: int = 7, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        _positive(self.card.name, window=window)
        self.window, self.attention = window, Heads(dim, heads, bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        sizes, real = x.shape[1:3], call.padding
        windows = windows_of([blocks(size, self.window) for size in sizes], sizes, device=x.device)
        return Result(*attend_cells(self.attention, shown(x, real), windows, real, call.need_weights))


@register
class TwinsGlobal(Mechanism):
    """Global sub-sampled attention: every cell attends to one summary of each reduce x reduce square.

        r = LN(conv(x)), kernel and stride `reduce`;  y = softmax(q(x) k(r)^T / sqrt(d)) v(r)

    reduce=1: plain attention, without conv and norm. x: [b, height, width, dim]; squares at the rim are filled up with
    zeros (the released code drops them), and one without a real cell is no key. Matrix: a square's are spread evenly
    over its real cells, though the convolution need not read them so. Norms, residual and MLP stand around it.

    Source: arXiv:2104.13840.
    Weights: q is q_proj, kv is k_proj and v_proj in this order, proj is o_proj, sr is reduction, norm is norm.
    """

    card = Card(
        name="twins-global",
        title="Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
        reference=_REFERENCE,
        family=Family.GRID,
        patterns={"grid"},
        time="n^2 / reduce^2",
        state="",
        decodes=False,
        example={"reduce": 2},
        notes="For images: a grid has no order to decode along.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, reduce: int = 2, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        _positive(self.card.name, reduce=reduce)
        self.reduce, self.attention = reduce, Heads(dim, heads, bias)
        self.reduction = nn.Conv2d(dim, dim, reduce, stride=reduce) if reduce > 1 else None
        self.norm = nn.LayerNorm(dim, eps=1e-5) if reduce > 1 else None

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real, sizes, step = call.padding, x.shape[1:3], self.reduce
        x = shown(x, real)
        source, seen = x, real
        if self.reduction is not None and self.norm is not None:
            short = (0, -sizes[1] % step, 0, -sizes[0] % step)
            source = self.norm(convolve(self.reduction, F.pad(x, (0, 0, *short))))
            if real is not None:
                seen = F.pad(real, short).unflatten(2, (-1, step)).unflatten(1, (-1, step)).any(4).any(2)
        allowed = None if seen is None else seen.flatten(1)[:, None, None]
        k, v = self.attention.read(source.flatten(1, 2))
        q = self.attention.split(self.attention.q_proj(x.flatten(1, 2)))
        mixed, weights = attend_weighted(q, k, v, allowed, scale=self.attention.scale, need_weights=call.need_weights)
        output = self.attention.join(mixed).unflatten(1, tuple(sizes))
        return Result(output, None if weights is None else self._spread(weights, real, sizes))

    def _spread(self, weights: Tensor, real: Tensor | None, sizes: Any) -> Tensor:
        """[b, h, n, squares] -> [b, h, n, n]"""
        height, width = sizes
        there = weights.new_ones(1, height, width) if real is None else real.to(weights.dtype)
        rows, columns = (torch.arange(size, device=weights.device) // self.reduce for size in sizes)
        square = (rows[:, None] * -(-width // self.reduce) + columns).flatten()
        there = there.flatten(1)
        count = there.new_zeros(len(there), weights.shape[-1]).index_add(1, square, there).clamp(min=1)
        return weights[..., square] * (there / count[:, square])[:, None, None]
