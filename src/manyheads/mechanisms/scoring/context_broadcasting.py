"""Context broadcasting: uniform attention, added by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family, Pattern
from manyheads.functional.linear import Kernel, needs_matrix, widen
from manyheads.inner import Across
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class ContextBroadcasting(Mechanism):
    """Every token gets the mean of all tokens: the dense interaction that softmax attention is slow to learn.

        y_i = (x_i + mean_j x_j) / 2,  or with scaled=True  y_i = x_i + lambda * mean_j x_j,  lambda: [dim], learned

    No parameters without `scaled`. heads only shape the weights, (identity + uniform) / 2; they are None with `scaled`,
    where every feature has its own. Padded tokens are not in the mean, and their own output is zero.
    causal=True takes the mean of x_1 .. x_i: a form of ours, whose state is a sum and a count.
    x: [b, n, dim] or a grid [b, height, width, dim].
    Source: Hyeon-Woo et al., Scratching Visual Transformer's Back with Uniform Attention, arXiv:2210.08457, where it
    ends the feed-forward block of every layer, before the residual sum; lambda starts small, here at 0.1.
    """

    card = Card(
        name="context-broadcasting",
        title="Scratching Visual Transformer's Back with Uniform Attention",
        reference="arXiv:2210.08457",
        family=Family.SCORING,
        patterns={"noncausal-self", "causal-self", "grid"},
        time="n",
        state="1",
        parallel="state",
        example={"scaled": True},
        notes="Made to stand beside another attention. Alone, with no lookup by content: 7% on quick recall, 9% in "
        "five times the steps. With a state, weights do not reach back to earlier passes.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, scaled: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.scale = nn.Parameter(torch.full((dim,), 0.1)) if scaled else None

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        self._check(call)
        tokens = x.flatten(1, -2)
        real = torch.ones_like(tokens[..., 0], dtype=torch.bool) if call.padding is None else call.padding.flatten(1)
        tokens = tokens.masked_fill(~real[..., None], 0.0)
        if call.across is not None:
            mean = self._mean_of_all(tokens, call.across)
        else:
            mean = self._running_mean(tokens, real, call) if self.causal else self._mean(tokens, real)
        if self.scale is None:
            output = (tokens + mean.to(x.dtype)) / 2
        else:
            output = tokens + self.scale * mean.to(x.dtype)
        # Nothing is broadcast to where no token stands.
        output = output.masked_fill(~real[..., None], 0.0).view_as(x)
        return Result(output, self._weights(real, x.dtype) if call.need_weights else None)

    def _check(self, call: Call) -> None:
        if call.pattern is Pattern.GRID and self.causal:
            raise ValueError(f"{self.card.name}: a grid has no past; build it with causal=False")
        if call.dense is not None:
            raise ValueError(
                f"{self.card.name}: a dense mask was given, but there is one mean for all queries; give key padding "
                "[batch, n] as the mask"
            )
        needs_matrix(self.card.name, seen=call.seen, dense=None, need_weights=call.need_weights)

    def _mean(self, tokens: Tensor, real: Tensor) -> Tensor:
        """[b, 1, e]."""
        wide = widen(tokens)
        return wide.sum(1, keepdim=True) / real.sum(1).clamp(min=1).to(wide.dtype)[:, None, None]

    def _running_mean(self, tokens: Tensor, real: Tensor, call: Call) -> Tensor:
        """[b, n, e]."""
        total, count = widen(tokens).cumsum(1), real.cumsum(1)
        if call.state is not None:
            held = call.state.fixed
            if "count" in held:
                total, count = total + held["total"], count + held["count"]
            held["total"], held["count"] = total[:, -1:].clone(), count[:, -1:].clone()
            call.state.advance(tokens.shape[1])
        return total / count.clamp(min=1).to(total.dtype)[..., None]

    def _mean_of_all(self, tokens: Tensor, across: Across) -> Tensor:
        """[b, n, e], with the tokens of other processes: linear attention of one head, by weights that are all one."""
        ones = torch.ones_like(widen(tokens[:, None, :, :1]))
        return across.recall(ones, ones, widen(tokens)[:, None], Kernel(), causal=self.causal, slopes=None)[:, 0]

    def _weights(self, real: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self.scale is not None:
            return None
        b, n = real.shape
        seen = (real[:, :, None] & real[:, None, :]).to(dtype)
        seen = seen.tril() if self.causal else seen
        own = torch.eye(n, dtype=dtype, device=real.device) * real[:, :, None].to(dtype)
        weights = (own + seen / seen.sum(-1, keepdim=True).clamp(min=1)) / 2
        return weights[:, None].expand(b, self.heads, n, n)
