"""Gated parallel attention, of the Theme Transformer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.grouped import attend_rows
from manyheads.functional.kinds import checked_kinds
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.state import State


@register
class ThemeTransformer(Mechanism):
    """Self-attention and cross attention to a theme side by side, of which the region of the piece switches one on.

        out_i = (g_i cross(x_i + P(label_i), theme) + (1 - g_i) self(x_i + P(i), x_j + P(j), j <= i)) / 2,
        g_i = 1 where label_i > 0

    P: sinusoids. labels [b, n]: 0 outside the regions where the theme is played and 1, 2, .. along each of them, so
    that cross attention knows the place in the theme and not in the piece. exclusive=False: self-attention is on
    everywhere, as in every second layer.
    A mask speaks of the theme: x must hold no padding. Matrix: on the theme, g_i / 2 in sum.

    Source: Shih et al., Theme Transformer, arXiv:2111.04093, and its released decoder layer, whose halving it follows;
    without dropout. Residual, norm and feed-forward belong to the surrounding block. Without a theme there is nothing
    to gate: causal-self is not declared.
    """

    card = Card(
        name="theme-transformer",
        title="Theme Transformer: Symbolic Music Generation with Theme-Conditioned Transformer",
        reference="arXiv:2111.04093",
        family=Family.CROSS,
        patterns={"causal-cross"},
        time="n (n + m)",
        state="n",
        takes={"labels": "[b, n] integers, where in the theme a token is, 0 outside of it"},
        notes="x must hold no padding",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = True, exclusive: bool = True, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.exclusive = exclusive
        self.own, self.cross = Heads(dim, heads, bias), Heads(dim, heads, bias)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"labels": torch.arange(n)[None] % 3}

    def attend(self, x: Tensor, context: Tensor, call: Call) -> Result:
        label = checked_kinds(self.card.name, call.inputs["labels"], x, None, what="labels")
        gate = (label > 0)[..., None]
        own = self._own(x + _sinusoids(call.query_positions(x), x), call.state)
        keys, values = self._theme(context, call.state)
        allowed = call.dense if call.padding is None else key_mask(call.padding)
        asking = x + _sinusoids(label, x)
        cross, weights = self.cross(asking, keys, values, allowed, call.need_weights)
        if self.exclusive:
            own = torch.where(gate, 0.0, own)
        output = (own + torch.where(gate, cross, 0.0)) / 2
        if weights is not None:
            weights = torch.where(gate[:, None], weights, 0.0) / 2
        if call.state is not None:
            call.state.advance(x.shape[1])
        return Result(output, weights)

    def _own(self, x: Tensor, state: State | None) -> Tensor:
        q, (k, v) = self.own.split(self.own.q_proj(x)), self.own.read(x)
        if state is not None:
            k, v = state.append("keys", k), state.append("values", v)
        j = torch.arange(k.shape[2], device=x.device)
        i = j[-x.shape[1] :]

        def past(rows: slice) -> Tensor | None:
            return (j <= i[rows, None])[None, None] if len(i) > 1 else None

        return self.own.join(attend_rows(q, k, v, past, scale=self.own.scale, causal=True))

    def _theme(self, context: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
        held = {} if state is None else state.context
        if not held:
            held["keys"], held["values"] = self.cross.read(context)
        if held["keys"].shape[2] != context.shape[1]:
            raise ValueError(
                f"theme-transformer: the state was made for a theme of {held['keys'].shape[2]} tokens, this one has "
                f"{context.shape[1]}; start a new state for a new theme"
            )
        return held["keys"], held["values"]


def _sinusoids(places: Tensor, like: Tensor) -> Tensor:
    """places [b or 1, n] -> [b or 1, n, e]: sine and cosine in turn, wavelengths up to 10000 2 pi."""
    dim, wide = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
    rate = 10000.0 ** -(torch.arange(0, dim, 2, device=like.device, dtype=wide) / dim)
    angle = places[..., None].to(wide) * rate
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., :dim].to(like.dtype)
