"""Outlook attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import shown, square_means
from manyheads.functional.grid_windows import added_up, gathered, taps, whole_weights, windows_of
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class Volo(Mechanism):
    """A cell alone says how the kernel x kernel cells around it are mixed among themselves, without query and key.

        A_p = softmax over the last axis of W_a mean_p(x) / sqrt(d), [kernel^2, kernel^2] for each head
        y_i = W_o sum over windows p that hold i of sum_j A_p[i, j] v_j,  v = W_v x

    p: every stride-th cell of each axis, mean_p over its stride x stride square. Overlapping windows are summed, not
    averaged. x: [b, height, width, dim]; places outside the map and padded cells have v = 0 and keep their weight. The
    weights returned, [b, heads, n, n], are summed over windows too: rows sum to up to kernel^2.

    Source: Yuan et al., VOLO: Vision Outlooker for Visual Recognition, arXiv:2106.13112. bias: of W_v, none there; W_a
    and W_o have one.
    Weights: v is v_proj, attn is attention, proj is o_proj; kernel 3, padding 1, stride 2 in the published models.
    """

    card = Card(
        name="volo",
        title="VOLO: Vision Outlooker for Visual Recognition",
        reference="arXiv:2106.13112",
        family=Family.GRID,
        patterns={"grid"},
        time="n kernel^4 / stride^2",
        state="",
        decodes=False,
        notes="Local: a layer sees kernel - 1 cells to each side. The published models go on with plain attention on a "
        "coarser map.",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, kernel: int = 3, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if kernel < 1 or kernel % 2 == 0 or not 1 <= stride <= kernel:
            raise ValueError(
                f"{self.card.name}: kernel={kernel}, stride={stride}; want an odd kernel and 1 <= stride <= kernel, so "
                "that every cell is in a window"
            )
        self.kernel, self.stride = kernel, stride
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.attention = nn.Linear(dim, heads * kernel**4)
        self.o_proj = nn.Linear(dim, dim)
        # As released. Each cell sums kernel^2 windows: begun as linear layers usually are, that sum is many times x,
        # and what cells have in common drowns what tells them apart.
        for layer in (self.v_proj, self.attention, self.o_proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        sizes, real = x.shape[1:3], call.padding
        n, area = sizes[0] * sizes[1], self.kernel**2
        axes = [taps(size, self.kernel, stride=self.stride) for size in sizes]
        windows = windows_of(axes, sizes, device=x.device)
        means, there = square_means(x, real, self.stride)
        scores = self.attention(means).flatten(1, 2).unflatten(-1, (self.heads, area, area)).transpose(1, 2)
        weights = masked_softmax(scores * self.head_dim**-0.5, None)
        if there is not None:
            weights = weights * there.flatten(1)[:, None, :, None, None]
        v = shown(self.v_proj(x), real).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = added_up(weights @ gathered(v, windows.keys), windows.queries, n)
        output = self.o_proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, tuple(sizes))
        if not call.need_weights:
            return Result(output)
        whole = whole_weights(weights, windows, n, n)
        return Result(output, whole if real is None else whole * real.flatten(1)[:, None, None])
