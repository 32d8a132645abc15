"""Neighborhood attention along two or three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.cells import shown
from manyheads.functional.grid_extents import over_extents
from manyheads.functional.grid_windows import attend_cells, near, windows_of
from manyheads.functional.multihead import Heads
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class NeighborhoodGrid(Mechanism):
    """Every cell attends to the cells nearest to it along each axis; at the rim the window is moved inward, not cut.

        softmax over the cells j that are near i along every axis of q_i . k_j / sqrt(d), the rule of each axis being:
        u = i // dilation in the residue of i, of L' members;  leader = min(u // stride * stride + stride // 2, L' - 1)
        begin = clamp(leader - window // 2, 0, L' - window);  begin <= j // dilation < begin + window
        along an axis of causal_axes, with w = j // dilation: w <= u and leader - w < window, where
        leader = min(u // stride * stride + stride - 1, L' - 1)

    window, dilation, stride: one number, or one for each axis. A residue of fewer than `window` members is seen whole
    (NATTEN refuses it). x: [b, height, width, dim] or [b, depth, height, width, dim]; padding around the box of real
    cells counts for no size, within it for no key.

    Source: arXiv:2204.07143 (the rule), arXiv:2209.15001 (dilation), arXiv:2403.04690 (causality per axis, even
    windows: one more cell before than behind), arXiv:2504.16922 (stride). Of several axes, what the `neighborhood`
    mechanism is for one. The relative position bias of the first paper is left out, as in NATTEN's fused kernels.
    Weights: qkv is attention.q_proj, .k_proj, .v_proj in this order; proj is attention.o_proj.
    """

    card = Card(
        name="neighborhood-grid",
        title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        reference="arXiv:2403.04690",
        family=Family.SELECTION,
        patterns={"grid", "volume"},
        time="n window^2",
        state="",
        decodes=False,
        example={"window": 3},
        notes="A layer sees window * dilation cells along an axis; reach grows with depth. In a volume time is n "
        "window^3.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        window: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal_axes: Sequence[int] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.window, self.dilation, self.stride, self.causal_axes = window, dilation, stride, tuple(causal_axes or ())
        lengths = {len(given) for given in (window, dilation, stride) if not isinstance(given, int)}
        if lengths - {2, 3} or len(lengths) > 1 or set(self.causal_axes) - set(range(3)):
            raise ValueError(
                f"{self.card.name}: window={window}, dilation={dilation}, stride={stride}, causal_axes={causal_axes}; "
                "want one number or two or three each, as many as there are axes, and axes out of 0, 1, 2"
            )
        self.axes = lengths.pop() if lengths else None
        for wide, apart, step in self._rules(self.axes or 2):
            if wide < 1 or apart < 1 or not 1 <= step <= wide:
                raise ValueError(
                    f"{self.card.name}: window={window}, dilation={dilation}, stride={stride}; want window and "
                    "dilation >= 1 and 1 <= stride <= window"
                )
        self.attention = Heads(dim, heads, bias)

    def _rules(self, axes: int) -> list[tuple[int, int, int]]:
        """Window, dilation and stride of each axis."""
        given = (self.window, self.dilation, self.stride)
        return list(zip(*([one] * axes if isinstance(one, int) else one for one in given), strict=True))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        axes = x.ndim - 2
        if self.axes not in (None, axes) or any(axis >= axes for axis in self.causal_axes):
            raise ValueError(
                f"{self.card.name}: x has shape {tuple(x.shape)}, {axes} axes; it was built for window={self.window}, "
                f"dilation={self.dilation}, stride={self.stride}, causal_axes={self.causal_axes}"
            )

        def run(part: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
            sizes = part.shape[1:-1]
            rules = zip(sizes, self._rules(axes), strict=True)
            layout = [
                near(
                    size,
                    window,
                    dilation=dilation,
                    stride=stride,
                    causal=axis in self.causal_axes,
                    tile=8 if axes == 2 else 4,
                )
                for axis, (size, (window, dilation, stride)) in enumerate(rules)
            ]
            return attend_cells(
                self.attention, part, windows_of(layout, sizes, device=x.device), real, call.need_weights
            )

        return Result(*over_extents(shown(x, call.padding), call.padding, run))
