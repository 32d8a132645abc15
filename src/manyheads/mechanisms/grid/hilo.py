"""HiLo attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class HiLo(Mechanism):
    """Some heads attend within small windows (high frequencies), the others to the windows' means (low frequencies).

        Hi: softmax(q k^T / sqrt(d)) v among the pixels of a window x window square
        Lo: the same with q of every pixel and k, v of the average of each square;  y = [W_hi Hi ; W_lo Lo]

    alpha: part of the heads that are Lo, floor(alpha heads); they come second, in the output and in the weights. Each
    part projects to its own share of dim. window=1 makes all heads Lo with full keys: plain attention.
    x: [b, height, width, dim]; mask: [b, height, width]. Lo weights are spread evenly over the pixels of a square.

    Source: Pan, Cai, Zhuang, Fast Vision Transformers with HiLo Attention, arXiv:2205.13213. The released code wants
    height and width divisible by the window; here the squares at the rim attend to, and average, the real pixels that
    they have. bias: of all projections; there only the output projections have one.
    """

    card = Card(
        name="hilo",
        title="Fast Vision Transformers with HiLo Attention",
        reference="arXiv:2205.13213",
        family=Family.GRID,
        patterns={"grid"},
        time="n^2 / window^2",
        state="",
        decodes=False,
        example={"window": 2},
        notes="For images: a grid has no order to decode along. Slower to learn than agent and inline: 89% on quick "
        "digits, 91% in five times the steps.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        alpha: float = 0.5,
        window: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if not 0 <= alpha <= 1 or window < 1:
            raise ValueError(f"{self.card.name}: alpha={alpha}, window={window}; want 0 <= alpha <= 1 and window >= 1")
        self.window = window
        self.lo_heads = heads if window == 1 else int(heads * alpha)
        self.hi_heads = heads - self.lo_heads
        hi, lo = self.hi_heads * self.head_dim, self.lo_heads * self.head_dim
        self.hi_qkv = nn.Linear(dim, 3 * hi, bias=bias) if hi else None
        self.hi_proj = nn.Linear(hi, hi, bias=bias) if hi else None
        self.lo_q = nn.Linear(dim, lo, bias=bias) if lo else None
        self.lo_kv = nn.Linear(dim, 2 * lo, bias=bias) if lo else None
        self.lo_proj = nn.Linear(lo, lo, bias=bias) if lo else None

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        height, width = x.shape[1:3]
        real = call.padding
        if real is not None:
            x = x.masked_fill(~real[..., None], 0.0)
        tall, wide = -height % self.window, -width % self.window
        if real is None and (tall or wide):
            real = torch.ones(1, height, width, dtype=torch.bool, device=x.device)
        if real is not None:
            real = self._squares(F.pad(real, (0, wide, 0, tall))[..., None])[..., 0]
        squares = self._squares(F.pad(x, (0, 0, 0, wide, 0, tall)))
        outputs, weights = [], []
        for part in (self._hi, self._lo):
            mixed, matrix = part(squares, real, call.need_weights)
            if mixed is not None:
                outputs.append(self._pixels(mixed, height, width))
                weights.append(matrix)
        joined = torch.cat([self._keep(w, height, width) for w in weights], 1) if call.need_weights else None
        return Result(torch.cat(outputs, -1), joined)

    def _hi(self, squares: Tensor, real: Tensor | None, need_weights: bool) -> tuple[Any, Any]:
        """squares [b, r, c, s, e], real [b or 1, r, c, s] -> [b, r, c, s, hi] and [b, hi heads, pixels, pixels]."""
        if self.hi_qkv is None or self.hi_proj is None:
            return None, None
        (b, rows, columns, s), count = squares.shape[:4], squares.shape[1] * squares.shape[2]
        q, k, v = (
            t.view(b * count, s, self.hi_heads, self.head_dim).transpose(1, 2)
            for t in self.hi_qkv(squares).chunk(3, -1)
        )
        allowed = None if real is None else real.expand(b, -1, -1, -1).reshape(b * count, 1, 1, s)
        mixed, inner = attend_weighted(q, k, v, allowed, scale=self.head_dim**-0.5, need_weights=need_weights)
        matrix = None
        if inner is not None:
            inner = inner.view(b, count, self.hi_heads, s, s)
            same = torch.eye(count, dtype=inner.dtype, device=inner.device)
            matrix = torch.einsum("bwhij,wv->bhwivj", inner, same).reshape(b, self.hi_heads, count * s, count * s)
        return self.hi_proj(mixed.transpose(1, 2).reshape(b, rows, columns, s, -1)), matrix

    def _lo(self, squares: Tensor, real: Tensor | None, need_weights: bool) -> tuple[Any, Any]:
        """The same for the Lo heads."""
        if self.lo_q is None or self.lo_kv is None or self.lo_proj is None:
            return None, None
        b, rows, columns, s, _ = squares.shape
        allowed, share = None, squares.new_full((1, rows, columns, s), 1.0 / s)
        if real is not None:
            share = real / real.sum(-1, keepdim=True).clamp(min=1).to(squares.dtype)
            allowed = real.any(-1).flatten(1)[:, None, None, :]
        means = (squares * share[..., None]).sum(3).flatten(1, 2)
        q = self.lo_q(squares).view(b, -1, self.lo_heads, self.head_dim).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.lo_heads, self.head_dim)).transpose(1, 2) for t in self.lo_kv(means).chunk(2, -1))
        mixed, coarse = attend_weighted(q, k, v, allowed, scale=self.head_dim**-0.5, need_weights=need_weights)
        matrix = None if coarse is None else (coarse[..., None] * share.flatten(1, 2)[:, None, None]).flatten(-2)
        return self.lo_proj(mixed.transpose(1, 2).reshape(b, rows, columns, s, -1)), matrix

    def _squares(self, grid: Tensor) -> Tensor:
        """[b, H, W, e], H and W multiples of the window -> [b, H / window, W / window, window^2, e]."""
        split = grid.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
        return split.transpose(2, 3).flatten(3, 4)

    def _pixels(self, squares: Tensor, height: int, width: int) -> Tensor:
        """Back to [b, height, width, e], without what was added at the rim."""
        split = squares.unflatten(3, (self.window, self.window)).transpose(2, 3)
        return split.flatten(3, 4).flatten(1, 2)[:, :height, :width]

    def _keep(self, matrix: Tensor, height: int, width: int) -> Tensor:
        """The matrix over the pixels in reading order, from the one over squares."""
        rows, columns = -(-height // self.window), -(-width // self.window)
        places = torch.arange(matrix.shape[-1], device=matrix.device).view(1, rows, columns, self.window**2, 1)
        order = self._pixels(places, height, width).flatten()
        return matrix[:, :, order][..., order]
