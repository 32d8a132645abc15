"""Hedgehog linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.linear import (
    CHUNK,
    Kernel,
    Read,
    checked_chunk,
    matrix_read,
    needs_matrix,
    recall,
    self_read,
    summarise,
)
from manyheads.functional.rotary import Rotary, rotate
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

# As in the released feature map: no feature is zero, so that a query always finds some key.
SMALLEST = 1e-12


def feature_map(x: Tensor, weight: Tensor) -> Tensor:
    """x [b, h, n, d], weight [h, d, d] -> [softmax(x W), softmax(-x W)], [b, h, n, 2 d]."""
    y = x @ weight.to(x.dtype)
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).clamp(min=SMALLEST)


def exp_map(x: Tensor, weight: Tensor) -> Tensor:
    """x [b, h, n, d], weight [h, d, d] -> [exp(x W - max(x W)), exp(min(x W) - x W)], [b, h, n, 2 d]."""
    y = x @ weight.to(x.dtype)
    both = torch.cat((y - y.amax(-1, keepdim=True), y.amin(-1, keepdim=True) - y), -1)
    return both.exp().clamp(min=SMALLEST)


FEATURES = {"softmax": feature_map, "exp": exp_map}


@register
class Hedgehog(Mechanism):
    """Linear attention whose learned features make weights as spiky and as monotone as softmax attention's.

        phi(q_i) . phi(k_j) / (phi(q_i) . sum_j phi(k_j)),  phi(x) = [softmax(W x), softmax(-W x)]

    per head, over j <= i where causal. q and k have maps of their own, identities at first, applied after the rotary
    embedding and without 1 / sqrt(d). State: the sum of phi(k_j) [v_j, 1], 2 d (d + 1) numbers per head. chunk: tokens
    computed at once, which changes nothing but speed.
    features="exp": phi(x) = [exp(W x - max W x), exp(min W x - W x)], each half of each token scaled to a largest
    feature of one, the released `exp_dim` map.
    Source: Zhang et al., arXiv:2402.04347. The paper writes exp and normalises over features for stability, which is
    the released `softmax_dim` map followed here, with its floor of 1e-12 under every feature; its eps in the
    denominator is left out, as the floor keeps that positive. What `exp_dim` subtracts the paper's exp does not: it
    weighs keys, and the two halves, anew. Training maps to imitate a softmax model is not here.
    Weights: q_map and k_map are the released `layer` of each map (LoLCATs).
    """

    card = Card(
        name="hedgehog",
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        reference="arXiv:2402.04347",
        family=Family.LINEAR,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n",
        state="1",
        example={"chunk": 4},
        notes="With a state, neither dense masks nor weights reach back to earlier passes. Its features sharpen "
        "slowly: 79% on quick recall, 95% in five times the steps.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        features: str = "softmax",
        chunk: int = CHUNK,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if features not in FEATURES:
            raise ValueError(f"{self.card.name}: features={features!r}; want one of {list(FEATURES)}")
        self.features, self.chunk = FEATURES[features], checked_chunk(self.card.name, chunk)
        self.rotary = Rotary.of(rotary)
        if self.rotary:
            self.rotary.features(self.head_dim)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.q_map = nn.Parameter(torch.eye(self.head_dim).repeat(heads, 1, 1))
        self.k_map = nn.Parameter(torch.eye(self.head_dim).repeat(heads, 1, 1))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        positions = call.query_positions(x)
        q = self._placed(self.q_proj(x), positions)
        kernel = Kernel(partial(self.features, weight=self.q_map), partial(self.features, weight=self.k_map))
        read = self._cross(q, context, kernel, call) if context is not None else self._self(q, x, kernel, call)
        if call.state is not None:
            call.state.advance(x.shape[1])
        output = self.o_proj(read.mixed.transpose(1, 2).flatten(-2).to(x.dtype))
        return Result(output, read.weights.to(x.dtype) if call.need_weights and read.weights is not None else None)

    def _self(self, q: Tensor, x: Tensor, kernel: Kernel, call: Call) -> Read:
        matrix = needs_matrix(self.card.name, seen=call.seen, dense=call.dense, need_weights=call.need_weights)
        k, v = self._keys(x, call.query_positions(x))
        read = self_read(
            q,
            k,
            v,
            kernel,
            causal=self.causal,
            matrix=matrix,
            padding=call.padding,
            dense=call.dense,
            memory=None if call.state is None else call.state.fixed.get("memory"),
            keep=call.state is not None,
            chunk=self.chunk,
        )
        if call.state is not None:
            assert read.memory is not None
            call.state.fixed["memory"] = read.memory
        return read

    def _cross(self, q: Tensor, context: Tensor, kernel: Kernel, call: Call) -> Read:
        """Keys have no order, so that causal and non-causal queries read the same memory."""
        memory = self._context_memory(context, kernel, call)
        if not call.need_weights and call.dense is None:
            return Read(recall(q, memory, kernel, chunk=self.chunk))
        k, v = self._keys(context, torch.arange(context.shape[1], device=q.device)[None])
        mixed, weights = matrix_read(q, k, v, kernel, causal=False, padding=call.padding, dense=call.dense)
        return Read(mixed, None, weights)

    def _context_memory(self, context: Tensor, kernel: Kernel, call: Call) -> Tensor:
        """[b, h, 2 d, d + 1], made by the first pass of a state."""
        held = {} if call.state is None else call.state.context
        if "memory" not in held:
            k, v = self._keys(context, torch.arange(context.shape[1], device=context.device)[None])
            held["memory"] = summarise(k, v, kernel, padding=call.padding, chunk=self.chunk)
            # No bytes, only a shape: how long the context was.
            held["length"] = context.new_empty(context.shape[0], context.shape[1], 0)
        if held["length"].shape[1] != context.shape[1]:
            raise ValueError(
                f"{self.card.name}: the state was made for a context of {held['length'].shape[1]} tokens, this one "
                f"has {context.shape[1]}; start a new state for a new context"
            )
        return held["memory"]

    def _keys(self, source: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """source [b, m, e] -> k, v [b, h, m, d]."""
        return self._placed(self.k_proj(source), positions), self._heads(self.v_proj(source))

    def _placed(self, projected: Tensor, positions: Tensor) -> Tensor:
        x = self._heads(projected)
        return x if self.rotary is None else rotate(x, positions, self.rotary)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
