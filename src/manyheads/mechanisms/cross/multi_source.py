"""Multi-source cross attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.state import State

MODES = ("serial", "parallel", "flat", "hierarchical")


@register
class MultiSource(Mechanism):
    """Cross attention of one decoder to several encoders, combined in one of four ways.

        serial        c_i = c_(i-1) + A_i(LN_i(c_(i-1)), s_i), one source after the other;  result c_S - x
        parallel      sum_i A_i(x, s_i)
        flat          A(x, [s_1; ..; s_S]): one attention over all sources end to end
        hierarchical  A'(x, [A_1(x, s_1), .., A_S(x, s_S)]): a second attention, per position, over the S contexts

    A is multi-head attention, each with projections of its own. context and mask are tuples, one entry per source.
    Source: Libovicky, Helcl, Marecek, Input Combination Strategies for Multi-Source Transformer Decoder,
    arXiv:1811.04716. There each sublayer norms its query and adds its residual. The first norm and the last residual
    are the surrounding block's (x arrives normed, c_0 = x); LN_2 .. LN_S of serial lie inside. A' has as many heads as
    A_i and leaves out a source without real tokens, on which the paper is silent.
    Weights [b, heads, n, all m]: side by side per source (serial and parallel rows sum to S); for hierarchical, where
    no exact matrix exists, times the weight of that source in A', averaged over the heads of A'.
    """

    card = Card(
        name="multi-source",
        title="Input Combination Strategies for Multi-Source Transformer Decoder",
        reference="arXiv:1811.04716",
        family=Family.CROSS,
        patterns={"noncausal-cross", "causal-cross"},
        time="n^2",
        state="1",
        notes="the state keeps the projected contexts and nothing per decoded token",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        sources: int = 2,
        mode: str = "serial",
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        if mode not in MODES:
            raise ValueError(f"{self.card.name}: mode={mode!r}; want one of {list(MODES)}")
        if sources < 2:
            raise ValueError(f"{self.card.name}: sources={sources}; want at least 2 (for one, use 'softmax')")
        self.sources, self.mode = sources, mode
        self.attention = nn.ModuleList(Heads(dim, heads, bias) for _ in range(1 if mode == "flat" else sources))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(sources - 1 if mode == "serial" else 0))
        self.combine = Heads(dim, heads, bias) if mode == "hierarchical" else None

    def attend(self, x: Tensor, context: Sequence[Tensor], call: Call) -> Result:
        kept = self._read(context, call.state)
        if call.state is not None:
            call.state.advance(x.shape[1])
        paddings: list[Any] = [None] * self.sources if call.padding is None else list(call.padding)
        if self.mode == "flat":
            padding = None if call.padding is None else torch.cat(paddings, 1)
            return Result(*self.attention[0](x, *kept[0], key_mask(padding), call.need_weights))
        if self.mode == "serial":
            return self._serial(x, kept, paddings, call.need_weights)
        parts, weights = [], []
        for attention, keys_values, padding in zip(self.attention, kept, paddings, strict=True):
            part, weight = attention(x, *keys_values, key_mask(padding), call.need_weights)
            parts.append(part)
            weights.append(weight)
        if self.mode == "parallel":
            return Result(torch.stack(parts).sum(0), torch.cat(weights, -1) if call.need_weights else None)
        output, shares = self._over_contexts(x, torch.stack(parts, 2), call.padding)
        if not call.need_weights:
            return Result(output)
        share = shares.mean(1, keepdim=True)
        return Result(output, torch.cat([weight * share[..., i : i + 1] for i, weight in enumerate(weights)], -1))

    def _serial(self, x: Tensor, kept: list[tuple[Tensor, Tensor]], paddings: list[Any], need_weights: bool) -> Result:
        stream, weights = x, []
        for i, (attention, keys_values) in enumerate(zip(self.attention, kept, strict=True)):
            query = stream if i == 0 else self.norms[i - 1](stream)
            part, weight = attention(query, *keys_values, key_mask(paddings[i]), need_weights)
            stream = stream + part
            weights.append(weight)
        return Result(stream - x, torch.cat(weights, -1) if need_weights else None)

    def _over_contexts(self, x: Tensor, parts: Tensor, padding: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """x [b, n, e], parts [b, n, S, e] -> [b, n, e] and the shares of the sources [b, h, n, S]."""
        assert self.combine is not None
        q = self.combine.split(self.combine.q_proj(x)).transpose(1, 2)[..., None, :]  # [b, n, h, 1, d]
        k, v = self.combine.read(parts)  # [b, n, h, S, d]
        allowed = None
        if padding is not None:
            allowed = torch.stack([real.any(1) for real in padding], -1)[:, None, None, None, :]
        shares = masked_softmax(q * self.combine.scale @ k.transpose(-1, -2), allowed)
        output = self.combine.o_proj((shares @ v).flatten(2))
        return output, shares.squeeze(3).transpose(1, 2)

    def _read(self, context: Sequence[Tensor], state: State | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each attention, from the state where it has them."""
        lengths = [part.shape[1] for part in context]
        if self.mode == "flat":
            lengths = [sum(lengths)]
        held = {} if state is None else state.context
        if not held:
            sources = [torch.cat(list(context), 1)] if self.mode == "flat" else context
            kept = [attention.read(source) for attention, source in zip(self.attention, sources, strict=True)]  # type: ignore[operator]
            if state is not None:
                for i, (keys, values) in enumerate(kept):
                    state.context.update({f"keys_{i}": keys, f"values_{i}": values})
            return kept
        kept = [(held[f"keys_{i}"], held[f"values_{i}"]) for i in range(len(lengths))]
        found = [keys.shape[2] for keys, _ in kept]
        if found != lengths:
            raise ValueError(
                f"{self.card.name}: the state was made for contexts of {found} tokens, these have {lengths}; "
                "start a new state for new contexts"
            )
        return kept
