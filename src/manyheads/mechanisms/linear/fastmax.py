"""Fastmax: the factorizable attention of FAST."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.kernelised import in_stretches, joined, read_context, read_self, shown
from manyheads.functional.linear import CHUNK, Kernel, checked_chunk, taylor_features, taylor_value, widen
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

EPS = 1e-6


def standardise(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the features of each token; values whose squares overflow are shrunk first."""
    x = widen(x)
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, -1, keepdim=True).clamp(min=1.0)
    x = x / largest
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPS / largest.square()).rsqrt()


def affine_features(x: Tensor) -> Tensor:
    """[1, x], whose inner product is 1 + a . b."""
    return torch.cat((torch.ones_like(x[..., :1]), x), -1)


@register
class Fastmax(Mechanism):
    """Attention by a polynomial of the score, which factorises exactly, so that all pairs count at linear cost.

        f(s_ij) / sum_j f(s_ij),  f(s) = 1 + s + s^2 / 2 (p = 2) or 1 + s (p = 1),  s_ij = scale q'_i . k'_j

    with q', k' each token's q and k at mean 0 and variance 1 over the head's d features; over j <= i where causal.
    State: sums of 1, k', k' (x) k' times [v, 1], about d^2 (d + 1) numbers per head for p = 2. chunk: tokens computed
    at once.
    Source: Gerami et al., FAST, arXiv:2402.07901, whose normalisation per token is followed; the released function
    divides instead by the largest norm of the sequence, which would let the future in, or with its default
    normalize=False by nothing (s = q . k itself, which is not here). scale: 1 for p = 2, as in the code, which has no
    1 / sqrt(d). For p = 1 it is at most 1 / d, the default: beyond it weights can be negative and
    their sum zero. Dropout on the factors and the relative position matrix of the code are left out.
    """

    card = Card(
        name="fastmax",
        title="FAST: Factorizable Attention for Speeding up Transformers",
        reference="arXiv:2402.07901",
        family=Family.LINEAR,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n",
        state="1",
        parallel="state",
        example={"chunk": 4},
        notes="Time per token grows with the cube of the head dimension for p=2. With a state, neither dense masks nor "
        "weights reach back to earlier passes.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        p: int = 2,
        scale: float | None = None,
        chunk: int = CHUNK,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if self.head_dim < 2:
            raise ValueError(f"fastmax: dim={dim}, heads={heads} leave one feature per head, which has no variance")
        most = 1.0 / self.head_dim
        if p not in (1, 2):
            raise ValueError(f"fastmax: p={p}; want 1 or 2, the order of the polynomial")
        self.scale = (1.0 if p == 2 else most) if scale is None else scale
        if not 0 < self.scale < float("inf") or (p == 1 and self.scale > most):
            raise ValueError(
                f"fastmax: scale={scale} with p={p}; want a positive number"
                + (f" of at most 1 / head_dim = {most}, else weights can be negative" if p == 1 else "")
            )
        self.p, self.chunk = p, checked_chunk(self.card.name, chunk)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        long = in_stretches(self, x, call) if context is None else None
        if long is not None:
            return long
        q, kernel = self._heads(self.q_proj(x)), self._kernel()
        if context is not None:
            read = read_context(self.card.name, q, context, self._keys, kernel, call, chunk=self.chunk)
        else:
            k, v = self._keys(x)
            read = read_self(self.card.name, q, k, v, kernel, call, causal=self.causal, chunk=self.chunk)
        if call.state is not None:
            call.state.advance(x.shape[1])
        return Result(self.o_proj(joined(read.mixed, x)), shown(read.weights, call, x))

    def _kernel(self) -> Kernel:
        features, value = (affine_features, lambda s: 1 + s) if self.p == 1 else (taylor_features, taylor_value)
        return Kernel(lambda q: standardise(q) * self.scale, standardise, features, value)

    def _keys(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.k_proj(source)), self._heads(self.v_proj(source))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
