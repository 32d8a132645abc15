"""Lightning attention, the attention of TransNormerLLM."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.linear import CHUNK, Kernel, checked_chunk, needs_matrix, self_read
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

EPS = 1e-6
KERNEL = Kernel(query=F.silu, key=F.silu, floor=None)


def head_slopes(heads: int) -> list[float]:
    """2^(-8 h / heads) for h = 1 .. heads; for other than powers of two, every other slope of twice the next lower
    power fills up, as in ALiBi."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]


def simple_rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, with no weight; squares cannot overflow."""
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, -1, keepdim=True).clamp(min=1.0)
    y = x / largest
    return y * (y.square().mean(-1, keepdim=True) + EPS / largest.square()).rsqrt()


@register
class Lightning(Mechanism):
    """Linear attention with a fixed exponential decay per head and, instead of a denominator, a norm and a gate.

        a_i = sum over j <= i of exp(-slope (i - j)) (q_i . k_j) v_j,  out = Wo (u * rms_norm(a))

    with q = silu(Wq x), k = silu(Wk x), v = Wv x, u = Wu x, no 1 / sqrt(d), and the norm over all heads at once,
    without a weight. slope: ALiBi's, times decay_scale: for layer l of L the paper takes 1 - l / (L - 1). State: the
    decayed sum of k_j v_j, d^2 numbers per head. i - j counts real tokens; given positions are not used. chunk: tokens
    computed at once.
    Source: Qin et al., TransNormerLLM, arXiv:2307.14995; computed in chunks, arXiv:2401.04658 and 2405.17381. This is
    the released language model's block; the kernel repository's example module instead has silu on v too, LayerNorm
    and a low-rank sigmoid gate. LRPE, the rotation that the model adds in its first layer only, is left out.
    Weights: qkvu_proj of the released model is q, k, v, u in this order.
    """

    card = Card(
        name="lightning",
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        reference="arXiv:2405.17381",
        family=Family.LINEAR,
        patterns={"causal-self"},
        time="n",
        state="1",
        parallel="state",
        example={"chunk": 4},
        notes="Its weights are signed and do not sum to one. With a state, neither dense masks nor weights reach "
        "back to earlier passes. Slower to learn lookup than softmax: 84% on quick recall, 96% in five times "
        "the steps.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        decay_scale: float = 1.0,
        chunk: int = CHUNK,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if not 0 <= decay_scale < math.inf:
            raise ValueError(
                f"{self.card.name}: decay_scale={decay_scale} must be finite and at least 0 (0: nothing decays)"
            )
        self.head_dim = self._split_heads()
        self.chunk = checked_chunk(self.card.name, chunk)
        self.slopes = [decay_scale * slope for slope in head_slopes(heads)]
        self.q_proj, self.k_proj, self.v_proj, self.u_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=bias) for _ in range(5)
        )

    def attend(self, x: Tensor, context: Tensor | None, call: Call) -> Result:
        matrix = needs_matrix(self.card.name, seen=call.seen, dense=call.dense, need_weights=call.need_weights)
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        state = call.state
        read = self_read(
            q,
            k,
            v,
            KERNEL,
            causal=True,
            matrix=matrix,
            padding=call.padding,
            dense=call.dense,
            memory=None if state is None else state.fixed.get("memory"),
            # Not a buffer: a module in bfloat16 would round it.
            slopes=torch.tensor(self.slopes, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device),
            keep=state is not None,
            chunk=self.chunk,
            across=call.across,
        )
        if state is not None:
            assert read.memory is not None
            state.fixed["memory"] = read.memory
            state.advance(x.shape[1])
        normed = simple_rms_norm(read.mixed.transpose(1, 2).flatten(-2)).to(x.dtype)
        output = self.o_proj(self.u_proj(x) * normed)
        return Result(output, read.weights.to(x.dtype) if call.need_weights and read.weights is not None else None)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
