"""Attention weights that a layer takes over from the one below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class SharedWeights(Mechanism):
    """The weights of the layer below, over values of its own: queries and keys are computed once for several layers.

        output = (A x W_v) W_o,  A the weights [b, heads, n, m] of the layer below

    weights_below: A, for the queries of this pass over all keys so far; a model gives it those of the layer below,
    which hands on its own in turn. What causality, padding or a mask hides takes no weight; A is not normed again.
    Several of these above one `skim` are Skimformer (arXiv:2109.01078), which computes the attention of the layout
    once. State: values; who computes A keeps the keys. Heads are those of the layer below.

    Source: Xiao et al., arXiv:1906.11024, its shared self-attention. Which layers share says the list of layers, in the
    paper how alike their weights are; what it shares of cross attention is not here.
    """

    card = Card(
        name="shared-weights",
        title="Sharing Attention Weights for Fast Transformer",
        reference="arXiv:1906.11024",
        family=Family.MIXING,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        takes={"weights_below": "[b, heads, n, m], the weights of the layer below"},
        notes="The first layer of a model has none below it, and one that gives no weights has none to share.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(2))

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        i, h = torch.arange(n), torch.arange(self.heads)[:, None, None]
        return {"weights_below": (torch.sin(0.7 * i[:, None] * (i + 1) + i + h) ** 2 / 8 + 0.01)[None]}

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        v, padding, state = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), call.padding, call.state
        n, m = x.shape[1], call.seen + x.shape[1]
        weights = self._given(call.inputs["weights_below"], x, m)
        i = torch.arange(m - n, m, device=x.device)
        if state is not None:
            weights = state.as_stored(weights)
            usual = torch.ones(1, m, dtype=torch.bool, device=x.device)
            padding = state.append_optional("padding", padding, usual)
            v = state.append("values", v)
            state.advance(n)
        hidden = [] if padding is None else [~padding[:, None, None]]
        hidden += [] if call.dense is None else [~call.dense]
        hidden += [torch.arange(m, device=x.device) > i[:, None]] if self.causal else []
        for each in hidden:
            weights = weights.masked_fill(each, 0.0)
        mixed = weights @ v  # not offered to taps: there are no queries and keys here
        return Result(self.o_proj(mixed.transpose(1, 2).flatten(-2)), weights if call.need_weights else None)

    def _given(self, weights: Any, x: Tensor, keys: int) -> Tensor:
        wanted = (x.shape[0], self.heads, x.shape[1], keys)
        if not isinstance(weights, Tensor) or weights.shape != wanted or weights.device != x.device:
            what = f"{list(weights.shape)} on {weights.device}" if isinstance(weights, Tensor) else repr(weights)[:80]
            raise ValueError(
                f"shared-weights: weights_below is {what}; want {list(wanted)} on {x.device}: the layer below must "
                "give weights, of as many heads, over all keys so far"
            )
        return weights.to(x.dtype)
