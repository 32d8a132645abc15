"""LXMERT's cross-modality layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

EPS = 1e-12  # of all norms, as released


@register
class Lxmert(Mechanism):
    """One stream of a cross-modality layer: it attends to the other stream, then to itself, then passes a feed-forward.

        h = LN(x + cross(x, c)),  s = LN(h + self(h, h)),  y = LN(s + W_2 gelu(W_1 s))

    Both ways: one module per stream, each called with the states before the layer, as text(x, c) and image(c, x). The
    two share their cross attention: `image.cross = text.cross`. The result is y, residuals and norms included.
    A mask speaks of the context: x must hold no padding. Matrix: those of the cross attention.

    Source: Tan and Bansal, LXMERT, arXiv:1908.07490. The paper writes the two cross attentions with weights of their
    own; the released code (and Hugging Face's) shares one. Without dropout.
    """

    card = Card(
        name="lxmert",
        title="LXMERT: Learning Cross-Modality Encoder Representations from Transformers",
        reference="arXiv:1908.07490",
        family=Family.CROSS,
        patterns={"noncausal-cross"},
        time="n m + n^2",
        state="",
        decodes=False,
        example={"hidden": 24},
        notes="residuals, norms and the feed-forward layer are inside; x must hold no padding",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, hidden: int | None = None, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        hidden = 4 * dim if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"lxmert: hidden={hidden}; want the width of the feed-forward layer, at least 1")
        self.cross, self.own = Heads(dim, heads, bias), Heads(dim, heads, bias)
        self.up, self.down = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.norm_cross, self.norm_own, self.norm_out = (nn.LayerNorm(dim, eps=EPS) for _ in range(3))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        allowed = call.dense if call.padding is None else key_mask(call.padding)
        mixed, weights = self.cross(x, *self.cross.read(context), allowed, call.need_weights)
        h = self.norm_cross(x + mixed)
        s = self.norm_own(h + self.own(h, *self.own.read(h), None, False)[0])
        return Result(self.norm_out(s + self.down(F.gelu(self.up(s)))), weights)
