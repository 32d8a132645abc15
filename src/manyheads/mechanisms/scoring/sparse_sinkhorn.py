"""Sparse Sinkhorn attention: blocks of keys are sorted next to the blocks that need them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.linear import hide, widen
from manyheads.functional.sinkhorn import transport_plan
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class SparseSinkhorn(Mechanism):
    """A block of queries attends to itself and to one more block, put beside it by a soft permutation of the blocks.

        R = sinkhorn(log(relu(mean q_I . mean k_J / sqrt(d))) / temperature),  K'_I = sum_J R_IJ K_J, V' likewise
        out_i = softmax over the tokens of block I and the slots of K'_I of (q_i . k / sqrt(d)), times v

    block: tokens per block, the last one may be shorter. iterations: of rows, then columns, so that columns of R sum to
    1, and rows almost. In training Gumbel noise is added to the logarithms. Padding is not in the means, blocks without
    a token are not sorted, and a slot counts if some block has a token there. Matrix over tokens: the weights of the
    block itself, plus slot weights times R.
    Source: Tay et al., Sparse Sinkhorn Attention, arXiv:2002.11296, whose sorting network maps a block's sum to places;
    this follows the form by mean queries and keys of the best-known code (sinkhorn-transformer), which any length
    allows, without its noise in evaluation and its sorted keys in place of sorted values.
    Weights: the code's to_kv is k, v in this order; its to_out has a bias, the others none.
    """

    card = Card(
        name="sparse-sinkhorn",
        title="Sparse Sinkhorn Attention",
        reference="arXiv:2002.11296",
        family=Family.SCORING,
        patterns={"noncausal-self"},
        time="n block + (n / block)^2 block",
        state="",
        decodes=False,
        example={"block": 4},
        notes="no causal form: balancing the columns lets later blocks change what earlier ones get",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        block: int = 64,
        iterations: int = 8,
        temperature: float = 0.7,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if block < 1 or iterations < 1 or not temperature > 0:
            raise ValueError(
                f"sparse-sinkhorn: block={block}, iterations={iterations}, temperature={temperature}; want all above 0"
            )
        self.block, self.iterations, self.temperature = block, iterations, temperature
        self.scale = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "sparse-sinkhorn: a dense mask was given, but sorted keys are mixtures of tokens; give key padding "
                "[batch, n] as the mask"
            )
        n, gap = x.shape[1], -x.shape[1] % self.block
        q, k, v = (self._blocks(p(x), call.padding, gap) for p in (self.q_proj, self.k_proj, self.v_proj))
        real = None if call.padding is None and not gap else self._real(x, call.padding, gap)
        order = self._order(q, k, real).to(x.dtype)
        keys, values = (torch.cat((t, (order @ t.flatten(3)).view_as(t)), 3) for t in (k, v))
        allowed = None
        if real is not None:
            slots = real.any(1, keepdim=True) & real.any(2, keepdim=True)
            allowed = torch.cat((real, slots), 2)[:, None, :, None]
        weights = masked_softmax((q * self.scale) @ keys.mT, allowed)
        mixed = (weights @ values).flatten(2, 3)[:, :, :n]
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        if not call.need_weights:
            return Result(output)
        real = self._real(x, call.padding, gap) if real is None else real
        return Result(output, self._over_tokens(weights, order, real, n))

    def _blocks(self, t: Tensor, padding: Tensor | None, gap: int) -> Tensor:
        """[b, n, e] -> [b, h, c, s, d], zero where nothing stands."""
        t = hide(t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2), padding)
        t = F.pad(t, (0, 0, 0, gap)) if gap else t
        return t.unflatten(2, (-1, self.block)).contiguous()

    def _real(self, x: Tensor, padding: Tensor | None, gap: int) -> Tensor:
        """Where a token stands, [b, c, s]."""
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if padding is None else padding
        return F.pad(real, (0, gap)).unflatten(1, (-1, self.block))

    def _order(self, q: Tensor, k: Tensor, real: Tensor | None) -> Tensor:
        """[b, h, c, c]: how much of block J comes to stand beside block I."""
        count = self.block if real is None else real.sum(2).clamp(min=1).to(q.dtype)[:, None, :, None]
        affinity = ((q.sum(3) / count) @ (k.sum(3) / count).mT * self.scale).relu()
        logits = (widen(affinity) + 1e-6).log()
        if self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()
        some = None if real is None else real.any(2)
        pairs = None if some is None else (some[:, :, None] & some[:, None])[:, None]
        # Rows first, columns last, which is the plan of the transpose.
        pairs = None if pairs is None else pairs.mT
        return transport_plan(logits.mT / self.temperature, pairs, self.iterations).mT

    def _over_tokens(self, weights: Tensor, order: Tensor, real: Tensor, n: int) -> Tensor:
        b, h, c, s, _ = weights.shape
        own, sorted_in = weights.split(s, -1)
        full = torch.einsum("bhiqs,bhij->bhiqjs", sorted_in, order)
        at = torch.arange(c, device=weights.device)
        full[:, :, at, :, at] = full[:, :, at, :, at] + own.permute(2, 0, 1, 3, 4)
        full = full.masked_fill(~real[:, None, None, None], 0.0)
        return full.reshape(b, h, c * s, c * s)[:, :, :n, :n]
