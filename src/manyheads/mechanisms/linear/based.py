"""The linear attention of Based."""

from __future__ import annotations

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.linear import (
    CHUNK,
    Kernel,
    checked_chunk,
    needs_matrix,
    self_read,
    taylor_features,
    taylor_value,
)
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

# A row that sees a key sums to at least a half; what is far less is no key, or a rounding error of huge inputs.
TAYLOR = Kernel(features=taylor_features, value=taylor_value, floor=0.25)


@register
class Based(Mechanism):
    """Linear attention by the second-order Taylor expansion of exp: global recall from a state of fixed size.

        (1 + s_ij + s_ij^2 / 2) v_j, summed over j and divided by the sum of weights,  s_ij = q_i . k_j / sqrt(f)

    per head, over j <= i where causal. feature_dim: f, the width of q and k. The weight is an inner product of
    phi(x) = [1, x / f^(1/4), x (x) x / sqrt(2 f)], so that the state is the sum of phi(k_j) [v_j, 1]:
    (1 + f + f^2) (d + 1) numbers per head. chunk: tokens computed at once, which changes nothing but speed.
    Source: Arora et al., arXiv:2402.18668. The paper stacks such layers in turn with sliding windows of 64 to 128
    tokens (and short convolutions): that is a model's list of layers, not part of this one. All f^2 products are
    kept, as in the released code. Its eps in the denominator is left out: no weight is below 1/2. The non-causal
    form is the same sum over all j; the paper has only the causal one.
    """

    card = Card(
        name="based",
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        reference="arXiv:2402.18668",
        family=Family.LINEAR,
        patterns={"noncausal-self", "causal-self"},
        time="n",
        state="1",
        parallel="state",
        notes="Meant to alternate with sliding-window layers. With a state, neither dense masks nor weights reach "
        "back to earlier passes.",
        example={"feature_dim": 3, "chunk": 4},
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        feature_dim: int = 16,
        chunk: int = CHUNK,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if feature_dim < 1:
            raise ValueError(f"{self.card.name}: feature_dim={feature_dim} must be at least 1")
        self.head_dim, self.feature_dim = self._split_heads(), feature_dim
        self.chunk = checked_chunk(self.card.name, chunk)
        self.q_proj = nn.Linear(dim, heads * feature_dim, bias=bias)
        self.k_proj = nn.Linear(dim, heads * feature_dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, context: Tensor | None, call: Call) -> Result:
        matrix = needs_matrix(self.card.name, seen=call.seen, dense=call.dense, need_weights=call.need_weights)
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        state, share = call.state, self.feature_dim**-0.25
        read = self_read(
            q * share,
            k * share,
            v,
            TAYLOR,
            causal=self.causal,
            matrix=matrix,
            padding=call.padding,
            dense=call.dense,
            memory=None if state is None else state.fixed.get("memory"),
            keep=state is not None,
            chunk=self.chunk,
            across=call.across,
        )
        if state is not None:
            assert read.memory is not None
            state.fixed["memory"] = read.memory
            state.advance(x.shape[1])
        output = self.o_proj(read.mixed.transpose(1, 2).flatten(-2).to(x.dtype))
        return Result(output, read.weights.to(x.dtype) if call.need_weights and read.weights is not None else None)
