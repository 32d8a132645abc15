"""Hedgehog linear attention."""

from __future__ import annotations

import math
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
from manyheads.functional.near_far import Mixer, Tail, near_far_matrix, near_far_read
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention

# As in the released feature map: no feature is zero, so that a query always finds some key.
SMALLEST = 1e-12
# The share of the window that LoLCATs begins with.
SHARE = 0.1


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
class Hedgehog(SoftmaxAttention):
    """Linear attention whose learned features make weights as spiky and as monotone as softmax attention's.

        phi(q_i) . phi(k_j) / (phi(q_i) . sum_j phi(k_j)),  phi(x) = [softmax(W x), softmax(-W x)]

    per query head, over j <= i where causal. q and k have maps of their own, identities at first, applied after the
    rotary embedding and without 1 / sqrt(d). State: the sum of phi(k_j) [v_j, 1], 2 d (d + 1) numbers per query head.
    chunk: tokens computed at once, which changes nothing but speed. features="exp": phi(x) = [exp(W x - max W x),
    exp(min W x - W x)], each half of each token scaled to a largest feature of one, the released `exp_dim` map.
    window: LoLCATs (arXiv:2410.10254). Softmax over the `window` newest real tokens, the kernel behind them, under one
    denominator (`functional.near_far`), causal only. g = sigmoid(window_factor), a tenth at first. As in the released
    code the near weights are divided by e^(their largest score) and the far are not, so that how near and far are
    balanced does not follow the true scores. State: the window's keys and values besides.
    Source: Zhang et al., arXiv:2402.04347. The paper writes exp and normalises over features for stability, which is
    the released `softmax_dim` map followed here, with its floor of 1e-12 under every feature; its eps in the
    denominator is left out, as the floor keeps that positive. What `exp_dim` subtracts the paper's exp does not: it
    weighs keys, and the two halves, anew. Learning from a softmax model is `manyheads convert`.
    Weights: q_map and k_map are the released `layer` of each map, window_factor `window_factors` without its axes.
    """

    card = Card(
        name="hedgehog",
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        reference="arXiv:2402.04347",
        family=Family.LINEAR,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n",
        state="1",
        parallel="state",
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
        window: int = 0,
        chunk: int = CHUNK,
        kv_heads: int | None = None,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)
        if features not in FEATURES:
            raise ValueError(f"{self.card.name}: features={features!r}; want one of {list(FEATURES)}")
        if window < 0 or (window and not causal):
            raise ValueError(
                f"{self.card.name}: window={window} with causal={causal}; a window is of the newest tokens, 1 or more "
                "of them with causal=True; 0 is none"
            )
        self.features, self.chunk, self.window = FEATURES[features], checked_chunk(self.card.name, chunk), window
        self.q_map = nn.Parameter(torch.eye(self.head_dim).repeat(heads, 1, 1))
        self.k_map = nn.Parameter(torch.eye(self.head_dim).repeat(heads, 1, 1))
        if window:
            self.window_factor = nn.Parameter(torch.full((heads,), math.log(SHARE / (1 - SHARE))))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        kernel = Kernel(partial(self.features, weight=self.q_map), partial(self.features, weight=self.k_map))
        if context is not None:
            if self.window:
                raise ValueError(f"{self.card.name}: window={self.window} is of x's own tokens; give no context")
            read = self._cross(x, context, kernel, call)
        else:
            read = self._near_far(x, kernel, call) if self.window else self._self(x, kernel, call)
        if call.state is not None:
            call.state.advance(x.shape[1])
        output = self.o_proj(read.mixed.transpose(1, 2).flatten(-2).to(x.dtype))
        return Result(output, read.weights.to(x.dtype) if call.need_weights and read.weights is not None else None)

    def _self(self, x: Tensor, kernel: Kernel, call: Call) -> Read:
        matrix = needs_matrix(self.card.name, seen=call.seen, dense=call.dense, need_weights=call.need_weights)
        q, k, v = self._heads(x, x, call)
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
            across=call.across,
        )
        if call.state is not None:
            assert read.memory is not None
            call.state.fixed["memory"] = read.memory
        return read

    def _near_far(self, x: Tensor, kernel: Kernel, call: Call) -> Read:
        if call.across is not None:
            raise ValueError(
                f"{self.card.name}: window={self.window} shares a denominator with what is behind it, for which no "
                "scheme over several processes is here; want window=0"
            )
        matrix = needs_matrix(self.card.name, seen=call.seen, dense=call.dense, need_weights=call.need_weights)
        q, k, v = self._heads(x, x, call)
        mixer = Mixer(kernel, self.window_factor.sigmoid(), self.scale, self.window)
        state, tail = call.state, None
        if state is not None and "memory" in state.fixed:
            tail = Tail(*(state.fixed[part] for part in Tail._fields))
        mixed, weights = None, None
        if matrix:
            mixed, weights = near_far_matrix(q, k, v, mixer, padding=call.padding, dense=call.dense)
        if mixed is None or state is not None:
            read, tail = near_far_read(
                q, k, v, mixer, padding=call.padding, tail=tail, keep=state is not None, chunk=self.chunk
            )
            mixed = read if mixed is None else mixed
        if state is not None:
            assert tail is not None
            state.fixed.update(tail._asdict())
        return Read(mixed, None, weights)

    def _cross(self, x: Tensor, context: Tensor, kernel: Kernel, call: Call) -> Read:
        """Keys have no order, so that causal and non-causal queries read the same memory."""
        held = {} if call.state is None else call.state.context
        whole = "memory" not in held or call.need_weights or call.dense is not None
        q, k, v = self._heads(x, context if whole else context[:, :0], call)
        if "memory" not in held:
            held["memory"] = summarise(k, v, kernel, padding=call.padding, chunk=self.chunk)
            # No bytes, only a shape: how long the context was.
            held["length"] = context.new_empty(context.shape[0], context.shape[1], 0)
        if held["length"].shape[1] != context.shape[1]:
            raise ValueError(
                f"{self.card.name}: the state was made for a context of {held['length'].shape[1]} tokens, this one "
                f"has {context.shape[1]}; start a new state for a new context"
            )
        if not call.need_weights and call.dense is None:
            return Read(recall(q, held["memory"], kernel, chunk=self.chunk))
        mixed, weights = matrix_read(q, k, v, kernel, causal=False, padding=call.padding, dense=call.dense)
        return Read(mixed, None, weights)

    def _heads(self, x: Tensor, source: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q [b, h, n, d], k and v [b, h, m, d], placed; shared heads are repeated, as every query head has its map."""
        positions = call.query_positions(x)
        own = torch.arange(source.shape[1], device=x.device)[None] if call.pattern.cross else positions
        q, k, v = self.project(x, source)
        q, k = self.position(q, k, positions, own)
        if self.kv_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        return q, k, v
