"""Partial attention language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.kinds import checked_kinds
from manyheads.functional.passes import attend_where, joined
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.softmax import Where


class _Heads(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, mixed: Tensor) -> Tensor:
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


@register
class PartialAttention(Mechanism):
    """A decoder-only block that goes on looking at its source: attention to the source alone, behind the ordinary one.

        c = A(x),   output = c + A'(LN(x + c), F(x_source)),   F = W_2 tanh(W_1 ..),  A, A' multi-head attention

    token_kinds [b, n]: 0 for the source, which comes first and is as long as each row has it, any other for the target;
    without them the first `source_length` positions are the source. A is causal over all tokens; A' of a target token
    sees the whole source, A' of a source token what stands before it, so that nothing leaks: in the model sources
    attend both ways. In cross attention the context is the source, and A goes over it and the targets so far.
    Matrix: the mean of the two matrices (cross: its columns for the context). Positions that start again at the
    target, and the embedding of which part a token is of, are a model's by_kind=["embedding", "positions"]; the loss
    that reconstructs the source is not here.
    Source: Fu et al., arXiv:2304.04052 (PALM); its text gives the idea, the equation is that of a public port
    (christianThardy/Partial-Attention-Mechanism). Norms and residuals of the port, which come after each sublayer, are
    here before A', and around the block.
    """

    card = Card(
        name="partial-attention",
        title="Decoder-Only or Encoder-Decoder? Interpreting Language Model as a Regularized Encoder-Decoder",
        reference="arXiv:2304.04052",
        family=Family.PROJECTION,
        patterns={"causal-self", "causal-cross"},
        time="n^2",
        state="n",
        example={"source_length": 4},
        takes={"token_kinds": "optional: [b, n] integers, 0 for a token of the source"},
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = True, source_length: int = 128, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.scale = self._split_heads() ** -0.5
        if source_length < 1:
            raise ValueError(f"partial-attention: source_length={source_length} must be positive")
        self.source_length = source_length
        self.attention, self.partial = _Heads(dim, heads, bias), _Heads(dim, heads, bias)
        self.norm = nn.LayerNorm(dim)
        self.source_map = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        own, need, seen = self.attention, call.need_weights, call.seen
        if context is None:
            k, v = own.split(own.k_proj(x)), own.split(own.v_proj(x))
            source = self._told(x, call)  # before the state counts on
            where, (k, v) = joined(call, x, self.causal, keys=k, values=v)
        else:
            if call.inputs.get("token_kinds") is not None:
                raise ValueError("partial-attention: a context is the source; leave token_kinds out beside it")
            where, k, v = self._behind(x, context, call)
        mixed, weights = attend_where(own.split(own.q_proj(x)), k, v, where, scale=self.scale, need_weights=need)
        first = own.join(mixed)
        k, v, allowed = self._source(x, seen, where, call, source) if context is None else self._context(context, call)
        q = self.partial.split(self.partial.q_proj(self.norm(x + first)))
        mixed, partial = attend_weighted(q, k, v, allowed, scale=self.scale, need_weights=need)
        output = first + self.partial.join(mixed)
        if weights is None or partial is None:
            return Result(output)
        weights = weights if context is None else weights[..., : partial.shape[-1]]
        return Result(output, (weights + F.pad(partial, (0, weights.shape[-1] - partial.shape[-1]))) / 2)

    def _behind(self, x: Tensor, context: Tensor, call: Call) -> tuple[Where, Tensor, Tensor]:
        """Keys and values of the context and, behind it, of the targets so far. Places in the context are negative."""
        n, m, state, seen = x.shape[1], context.shape[1], call.state, call.seen
        if state is not None and "keys" in state.grown and len(state.grown["keys"]) != m + seen:
            raise ValueError(
                f"partial-attention: the state was made for a context of {len(state.grown['keys']) - seen} tokens, "
                f"this one has {m}; start a new state for a new context"
            )
        tokens = x if state is not None and "keys" in state.grown else torch.cat([context, x], 1)
        k, v = (self.attention.split(p(tokens)) for p in (self.attention.k_proj, self.attention.v_proj))
        if state is not None:
            k, v = state.append("keys", k), state.append("values", v)
            state.advance(n)
        j = torch.arange(-m, seen + n, device=x.device)
        padding, dense = call.padding, call.dense
        if padding is not None:
            padding = F.pad(padding, (0, seen + n), value=True)
        if dense is not None:
            dense = F.pad(dense, (0, seen + n), value=True)
        return Where(j[m + seen :], j, call.query_positions(x), j[None], padding, dense, causal=True), k, v

    def _context(self, context: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the context as the source, read once, and who may attend to them."""
        held = {} if call.state is None else call.state.context
        if "source_keys" not in held:
            mapped = self.source_map(context)
            held["source_keys"] = self.partial.split(self.partial.k_proj(mapped))
            held["source_values"] = self.partial.split(self.partial.v_proj(mapped))
        allowed = call.dense if call.padding is None else call.padding[:, None, None]
        return held["source_keys"], held["source_values"], allowed

    def _told(self, x: Tensor, call: Call) -> Tensor | None:
        """Which of all tokens so far are the source's, [b, m], where the call says it; None where positions do."""
        kinds, state = call.inputs.get("token_kinds"), call.state
        told_before = state is not None and "source" in state.grown
        if kinds is None or (call.seen and not told_before):
            if kinds is not None or told_before:
                raise ValueError(
                    "partial-attention: token_kinds were given in some passes of a state only; give them in all or none"
                )
            return None
        source = checked_kinds("partial-attention", kinds, x, call.padding, None) == 0
        return source if state is None else state.append("source", source)

    def _source(
        self, x: Tensor, seen: int, where: Where, call: Call, told: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the columns that hold source tokens, and who may attend to them."""
        real = None if told is None else told if where.padding is None else told & where.padding
        columns = self._columns(where, call) if real is None else int((real.any(0) * (where.j + 1)).max())
        mapped = self.source_map(x[:, : max(columns - seen, 0)])
        k, v = (self.partial.split(p(mapped)) for p in (self.partial.k_proj, self.partial.v_proj))
        if call.state is not None:
            k, v = call.state.append("source_keys", k), call.state.append("source_values", v)
        if k.shape[2] != columns:
            what = "token_kinds came back to 0"
            if real is None:
                what = f"positions came back to below source_length={self.source_length}"
            raise ValueError(
                f"partial-attention: {what} after the target had begun; a state takes one source, at the start"
            )
        positions = where.key_positions[:, :columns]
        real = positions < self.source_length if real is None else real[:, :columns]
        return (
            k,
            v,
            replace(
                where,
                j=where.j[:columns],
                key_positions=positions,
                padding=real if where.padding is None else real & where.padding[:, :columns],
                dense=None if where.dense is None else where.dense[..., :columns],
            ).allowed(),
        )

    def _columns(self, where: Where, call: Call) -> int:
        """How many of the first tokens hold the source in any row; with left padding rows differ."""
        if call.positions is None and (call.state is None or "positions" not in call.state.grown):
            return min(len(where.j), self.source_length)
        inside = (where.key_positions < self.source_length).any(0)
        return int((inside * (where.j + 1)).max())
