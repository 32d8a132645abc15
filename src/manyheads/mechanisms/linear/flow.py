"""Flow-Attention, the attention of Flowformer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.kernelised import in_stretches, joined, real_tokens, shown
from manyheads.functional.linear import (
    CHUNK,
    Kernel,
    checked_chunk,
    hide,
    needs_matrix,
    recall,
    self_read,
    summarise,
    widen,
)
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

EPS = 1e-6
KERNEL = Kernel(floor=None)


class Flow(NamedTuple):
    """asking [b, h, n, d]: sigmoid(q) over the flow into its sink. offered [b, h, m, d]: values, weighed by their
    competition. given [b, h, m, 1]: that weight alone. allocated [b, h, n, 1]: the share of each sink."""

    asking: Tensor
    offered: Tensor
    given: Tensor
    allocated: Tensor


@register
class FlowAttention(Mechanism):
    """Linear attention as a flow from sources (values) to sinks (outputs) that is conserved: sources must compete.

        I_i = q_i . sum_j k_j,  O_j = k_j . sum_i q_i,  I'_i = q_i . sum_j k_j / O_j,  O'_j = k_j . sum_i q_i / I_i
        out_i = sigmoid(I'_i n / m) (q_i / I_i) sum_j k_j m softmax(O')_j v_j,  q, k after a sigmoid, per head

    and a projection. A grid [b, height, width, dim] is a sequence of its cells, in any order, as no place is known
    here. Causal: each sum is over the prefix, as a mean for I' and O', and the softmax of source j is over
    sources up to j, so that its share is fixed once it is seen. State: six such sums, d^2 + 4 d + 2 numbers per head.
    Source: Wu et al., Flowformer, arXiv:2202.06258; the released Flow_Attention.py, with its 1e-6 per feature, O'
    within [-1, 1] (newer than the paper) and biases; without its dropout. The code for images (Flowformer_CV, whose qkv
    is q, k, v in this order) adds 1e-6 to each reciprocal and conserved flow as well, which is not done here. Matrix:
    all factors but the values.
    """

    card = Card(
        name="flow",
        title="Flowformer: Linearizing Transformers with Conservation Flows",
        reference="arXiv:2202.06258",
        family=Family.LINEAR,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "grid"},
        time="n",
        state="1",
        parallel="state",
        example={"chunk": 4},
        notes="Flows are sums over all tokens, so that dense masks are refused. With a state, weights do not reach "
        "back to earlier passes. Sigmoid features weigh tokens nearly alike, so that lookup is blunt: 12% on "
        "quick recall, 23% in five times the steps.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, chunk: int = CHUNK, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        self.chunk = checked_chunk(self.card.name, chunk)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"flow: a dense mask of shape {tuple(call.dense.shape)} was given, but flows are sums over all tokens; "
                "give key padding [batch, n] as the mask"
            )
        if x.ndim == 4:
            rows = replace(call, padding=None if call.padding is None else call.padding.flatten(1))
            found = self.attend(x.flatten(1, 2), None, rows)
            return found._replace(output=found.output.view(x.shape))
        long = in_stretches(self, x, call)
        if long is not None:
            return long
        source = x if context is None else context
        sources = real_tokens(source, call.padding)
        sinks = sources if context is None else real_tokens(x, None)
        q, k, v = (
            widen(self._heads(p(t))) for p, t in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        # Hidden after the sigmoid: sums over the tokens then leave them out.
        q, k, v = hide(q.sigmoid(), sinks), hide(k.sigmoid(), sources), hide(v, sources)
        weights = None
        if self.causal:
            needs_matrix(self.card.name, seen=call.seen, dense=None, need_weights=call.need_weights)
            flow = self._running(q, k, v, sources, call)
            memory = None if call.state is None else call.state.fixed.get("memory")
            keep = call.state is not None
            read = self_read(
                flow.asking, k, flow.offered, KERNEL, causal=True, matrix=False, memory=memory, keep=keep,
                chunk=self.chunk, across=call.across,
            )  # fmt: skip
            mixed = flow.allocated * read.mixed
            if call.state is not None and read.memory is not None:
                call.state.fixed["memory"] = read.memory
                call.state.advance(x.shape[1])
        else:
            flow = self._whole(q, k, v, sinks, sources)
            memory = summarise(k, flow.offered, KERNEL, chunk=self.chunk)
            mixed = flow.allocated * recall(flow.asking, memory, KERNEL, chunk=self.chunk)
        if call.need_weights:
            weights = flow.allocated * (flow.asking @ k.mT) * flow.given.mT
            weights = weights.tril() if self.causal else weights
        return Result(self.o_proj(joined(mixed, x)), shown(weights, call, x))

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, sources: Tensor) -> Flow:
        n, m = (real.sum(1).clamp(min=1).to(q.dtype)[:, None, None, None] for real in (sinks, sources))
        there = sources[:, None, :, None]
        # Padding flows neither in nor out: a reciprocal is zero there, since q and k are.
        incoming = 1 / _dot(q, k.sum(2, keepdim=True))
        outgoing = 1 / _dot(k, q.sum(2, keepdim=True))
        conserved_in = _dot(q, (k * outgoing).sum(2, keepdim=True))
        conserved_out = _dot(k, (q * incoming).sum(2, keepdim=True)).clamp(-1.0, 1.0)
        shares = conserved_out.exp().masked_fill(~there, 0.0)
        given = shares / shares.sum(2, keepdim=True).clamp(min=EPS) * m
        return Flow(q * incoming, v * given, given, (conserved_in * n / m).sigmoid())

    def _running(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, call: Call) -> Flow:
        there = real[:, None, :, None]
        count = self._count(there.to(q.dtype), call).clamp(min=1.0)
        incoming = count / _dot(q, self._sum("keys", k, call))
        outgoing = count / _dot(k, self._sum("queries", q, call))
        conserved_in = _dot(q, self._sum("outgoing", k * outgoing, call)) / count
        conserved_out = (_dot(k, self._sum("incoming", q * incoming, call)) / count).clamp(-1.0, 1.0)
        shares = conserved_out.exp().masked_fill(~there, 0.0)
        given = shares / self._sum("shares", shares, call).clamp(min=EPS) * count
        return Flow(q * incoming / count, v * given, given, conserved_in.sigmoid())

    def _count(self, there: Tensor, call: Call) -> Tensor:
        """Real tokens up to and with each, [b, h or 1, n, 1]: constants, so that nothing is passed back for them."""
        if call.across is None:
            return self._sum("count", there.expand(-1, self.heads, -1, -1), call)
        count = there.cumsum(2)
        return count + call.across.sums(count[:, :, -1:], causal=True)

    def _sum(self, name: str, rows: Tensor, call: Call) -> Tensor:
        """Sums of [b, h, n, .] up to and with each token, those of the state's passes too, or of other processes."""
        if call.across is not None:
            ones = torch.ones_like(rows[..., :1])
            return call.across.recall(ones, ones, rows, KERNEL, causal=True, slopes=None)
        sums, state = rows.cumsum(2), call.state
        if state is not None:
            if name in state.fixed:
                sums = sums + state.fixed[name]
            state.fixed[name] = sums[:, :, -1:].clone()
        return sums

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


def _dot(rows: Tensor, sums: Tensor) -> Tensor:
    """rows . sums over features, both raised by EPS: never zero."""
    return ((rows + EPS) * (sums + EPS)).sum(-1, keepdim=True)
