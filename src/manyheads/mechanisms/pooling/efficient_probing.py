"""Efficient probing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class EfficientProbing(Mechanism):
    """Pools a sequence into one vector with learned queries that compare with the tokens themselves: no key projection.

        a_m = softmax over i of (q_m . x_i / sqrt(dim));  y = concat over m of W_v^m sum_i a_mi x_i

    heads is the number of queries M; query m fills its own dim / M features of the result through its own rows of W_v.
    x: [b, n, dim] -> [b, dim]; weights: [b, M, 1, n].

    Source: Psomas et al., Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency,
    arXiv:2506.10178. The released code projects every token and then pools; projection being linear, this file pools
    first, which costs n M dim instead of n dim^2. Its narrower output (d_out) is left to the classifier that follows;
    the bias that W_v can have there (qkv_bias, off by default) is left out.
    Weights: queries is cls_token[0].
    """

    card = Card(
        name="efficient-probing",
        title="Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
        reference="arXiv:2506.10178",
        family=Family.POOLING,
        patterns={"pool"},
        time="n",
        state="",
        decodes=False,
        notes="a pool: the result has no time axis to decode along",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        self.queries = nn.Parameter(0.02 * torch.randn(heads, dim))
        self.v_proj = nn.Linear(dim, dim, bias=False)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if context is not None or call.dense is not None:
            what = "a context" if context is not None else "a dense mask"
            raise ValueError(f"{self.card.name} pools x with queries of its own: {what} was not expected; "
                             "give key padding [batch, n] as the mask to leave tokens out")  # fmt: skip
        allowed = None
        if call.padding is not None:
            allowed = call.padding[:, None]
            x = x.masked_fill(~call.padding[..., None], 0.0)
        weights = masked_softmax((self.queries * self.dim**-0.5) @ x.transpose(1, 2), allowed)
        pooled = weights @ x
        per_query = self.v_proj.weight.unflatten(0, (self.heads, self.head_dim))
        output = torch.einsum("bme,mde->bmd", pooled, per_query).flatten(1)
        return Result(output, weights[:, :, None] if call.need_weights else None)
