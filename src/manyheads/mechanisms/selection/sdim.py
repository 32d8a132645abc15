"""Attention by hash collision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.precision import unit
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class SDIM(Mechanism):
    """A query gathers the context tokens whose random hash equals its own; in expectation, those at a small angle.

        g-th signature of a vector: the `bits` signs of R_g x^h, with R_g random and fixed, x^h its features of head h
        o_i = mean over g of l2( sum of v_j over j with the g-th signature of i ),  l2(z) = z / |z|, l2(0) = 0

    The chance that a token counts in one signature is (1 - angle / pi)^bits. Queries and keys are the inputs; V and W_o
    are projections. Sums are made once per context, [heads, groups, 2^bits, d], and a query reads groups of
    them: its cost does not depend on the context's length. normalise=False leaves l2 out, as FuxiCTR's code does.
    The pool for a target item is a query of one token.

    Source: arXiv:2205.10249; the authors' code was not found (its m hash functions are groups x bits here). It hashes
    and adds the raw embeddings of items. That l2 is taken per signature, before the mean, is as remembered.
    No gradient passes through a hash: x gets none.
    """

    card = Card(
        name="sdim",
        title="Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction",
        reference="arXiv:2205.10249",
        family=Family.SELECTION,
        patterns={"noncausal-cross", "causal-cross"},
        time="n + m",
        state="1",
        example={"groups": 4, "bits": 1},
        notes="x learns nothing through it: what encodes queries needs another gradient.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        groups: int = 16,
        bits: int = 3,
        normalise: bool = True,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if groups < 1 or not 1 <= bits <= 16:
            raise ValueError(f"{self.card.name}: groups={groups}, bits={bits}; want groups >= 1 and bits from 1 to 16")
        self.groups, self.bits, self.normalise = groups, bits, normalise
        self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(2))
        self.register_buffer("planes", torch.randn(heads, self.head_dim, groups * bits))
        self.planes: Tensor

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"{self.card.name}: a dense mask was given, but its sums are made once for all queries; give key "
                "padding [batch, m] as the mask"
            )
        state = call.state
        if state is not None and "sums" in state.context:
            sums, sizes = state.context["sums"], state.context["sizes"]
        else:
            sums, sizes = self._sums(context, call.padding)
            if state is not None:
                state.context.update(sums=sums, sizes=sizes)
        if state is not None:
            state.advance(x.shape[1])
        own = self._signatures(x)
        found = sums.gather(3, own.mT[..., None].expand(-1, -1, -1, -1, self.head_dim))
        mixed = found.mean(2)
        # A query of NaN has some signature all the same: do not hide it.
        mixed = mixed + (x * 0).unflatten(-1, (self.heads, -1)).transpose(1, 2).sum(-1, keepdim=True)
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return Result(output, self._weights(own, context, sizes, call.padding) if call.need_weights else None)

    def _signatures(self, x: Tensor) -> Tensor:
        """[b, n, e] -> [b, h, n, g], numbers below 2^bits."""
        rows = x.detach().unflatten(-1, (self.heads, -1)).transpose(1, 2)
        signs = (rows @ self.planes > 0).long().unflatten(-1, (self.groups, self.bits))
        return (signs << torch.arange(self.bits, device=x.device)).sum(-1)

    def _sums(self, context: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums of values by signature [b, h, g, 2^bits, d], of length one where asked for, and what they were divided
        by, [b, h, g, 2^bits]."""
        values = self.v_proj(context)
        if padding is not None:
            values = values.masked_fill(~padding[..., None], 0.0)
        values = values.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        index = self._signatures(context).mT[..., None].expand(-1, -1, -1, -1, self.head_dim)
        empty = values.new_zeros(*index.shape[:3], 1 << self.bits, self.head_dim)
        sums = empty.scatter_add(3, index, values[:, :, None].expand_as(index))
        if not self.normalise:
            return sums, torch.ones_like(sums[..., 0])
        # The largest entry is taken out first: squares of tiny or huge sums must not leave the range of the type.
        scale = sums.detach().abs().amax(-1, keepdim=True)
        scaled = sums / scale.masked_fill(scale == 0, 1.0)
        return unit(scaled), torch.linalg.vector_norm(sums.detach(), dim=-1)

    def _weights(self, own: Tensor, context: Tensor, sizes: Tensor, padding: Tensor | None) -> Tensor:
        """The mean over groups of 1 / size where signatures meet, [b, h, n, m]."""
        size = sizes.gather(3, own.mT).mT
        share = torch.where(size > 0, 1 / size.masked_fill(size == 0, 1.0), 0.0)
        meet = own[:, :, :, None] == self._signatures(context)[:, :, None]
        weights = (meet * share[:, :, :, None]).mean(-1)
        return weights if padding is None else weights.masked_fill(~padding[:, None, None], 0.0)
