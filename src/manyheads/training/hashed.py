"""EcoFormer's attention: hashes that are learnt from similar and dissimilar tokens in place of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.linear import hide, widen
from manyheads.mechanism import Call, Mechanism, Result

# Of the released optimiser, for each bit.
RATE, MOMENTUM, STEPS = 5e-4, 0.9, 100


class Hashed(Mechanism):
    """Linear attention of tokens by the bits that they share, one projection for queries and keys.

        y_i = [A z(u_i) > 0],  z_m(u) = exp(-|u - a_m|^2 / (2 s)) - mean_m,  u = x W / |x W|
        out_i = ((r + 1) v_i + sum_j (y_i . y_j) v_j) / ((r + 1) n + sum_j y_i . y_j)

    per head, of r bits and m anchors a; s: mean squared distance of a row's n tokens to the anchors. Gradients go
    through y where A z lies between 0 and 1. `fit(x)` learns A; until then A and anchors are drawn. No causal form: s
    looks ahead. Additions are products here, as torch has no kernel for them.
    Source: Liu et al., EcoFormer, arXiv:2209.09004, as ShiftAddViT (arXiv:2306.06446) released it: `hashing/ksh.py` and
    `EcoformerFastAttention`, which fits at the first pass whatever comes; its bias r + 1 counts n times below and once
    above, as here. Not in the registry, whose suite wants gradients that are those of the function: a step's are not.
    Weights: the code's to_qk, to_v, proj are qk_proj, v_proj, o_proj; ksh.A, anchor, mvec without axes of length one.
    """

    card = Card(
        name="hashed",
        title="EcoFormer: Energy-Saving Attention with Linear Complexity",
        reference="arXiv:2209.09004",
        family=Family.LINEAR,
        patterns={"noncausal-self"},
        time="n",
        state="",
        decodes=False,
        notes="Additions in place of products of queries and keys; torch multiplies all the same.",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, bits: int = 16, anchors: int = 20, bias: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if bits < 1 or anchors < 1:
            raise ValueError(f"{self.card.name}: bits={bits}, anchors={anchors}; want 1 of each or more")
        self.bits = bits
        self.qk_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.register_buffer("hashes", torch.randn(heads, bits, anchors))
        self.register_buffer("anchors", F.normalize(torch.randn(heads, anchors, self.head_dim), dim=-1))
        self.register_buffer("means", torch.zeros(heads, anchors))
        self.hashes: Tensor
        self.anchors: Tensor
        self.means: Tensor

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        near = self._near(self._tokens(x), call.padding) - self.means[:, None].to(x)
        y = hide(_bits(near @ self.hashes.to(near).mT), call.padding)
        v = hide(widen(self.v_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)), call.padding)
        weights = None
        if call.dense is None and not call.need_weights:
            count = x.shape[1] if call.padding is None else call.padding.sum(1)[:, None, None, None].clamp(min=1)
            below = y @ y.sum(2)[..., None] + (self.bits + 1) * count
            mixed = (y @ (y.mT @ v) + (self.bits + 1) * v) / below
        else:
            weights = self._matrix(y, call)
            mixed = weights @ v
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2).to(x.dtype))
        return Result(output, None if weights is None or not call.need_weights else weights.to(x.dtype))

    def _tokens(self, x: Tensor) -> Tensor:
        """u [b, h, n, d]: a token of zeros stays one."""
        rows = widen(self.qk_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2))
        zero = (rows == 0).all(-1, keepdim=True)
        return rows / torch.where(zero, torch.ones_like(rows), rows).norm(dim=-1, keepdim=True)

    def _near(self, u: Tensor, padding: Tensor | None) -> Tensor:
        """The Gaussian of each token's distance to each anchor, [b, h, n, m]."""
        apart = (u[..., None, :] - self.anchors.to(u)[None, :, None]).square().sum(-1)
        real = torch.ones_like(apart) if padding is None else padding[:, None, :, None].expand_as(apart).to(apart)
        held = torch.where(real > 0, apart, 0.0)
        spread = held.sum((2, 3), keepdim=True) / real.sum((2, 3), keepdim=True).clamp(min=1)
        return (-held / (2 * spread.clamp(min=torch.finfo(apart.dtype).tiny))).exp()

    def _matrix(self, y: Tensor, call: Call) -> Tensor:
        n = y.shape[2]
        real = torch.ones(1, n, dtype=torch.bool, device=y.device) if call.padding is None else call.padding
        both = (real[:, :, None] & real[:, None, :])[:, None]
        allowed = both if call.dense is None else both & call.dense
        shared, own = y @ y.mT, torch.eye(n, dtype=y.dtype, device=y.device)
        below = ((shared + self.bits + 1) * allowed).sum(-1, keepdim=True)
        return (shared + (self.bits + 1) * own) * allowed / below.clamp(min=1)

    def fit(self, x: Tensor, *, nearest: int = 10, seed: int = 0) -> list[float]:
        """Learns the hashes from tokens x [b, n, dim]; anchors are tokens of the first row. Returns, of each bit, its
        loss - y S y / (n r), y of -1 and 1: S is r for the `nearest` most alike of a token, -r for as many least alike,
        less what earlier bits explain. A bit whose descent did not help stays as it was drawn."""
        count = self.hashes.shape[2]
        if x.shape[1] < max(count, 2 * nearest) or nearest < 1:
            raise ValueError(
                f"{self.card.name}: {x.shape[1]} tokens to learn hashes from; {count} anchors and {nearest} nearest "
                f"and farthest want {max(count, 2 * nearest)}: give longer rows, or fewer of them"
            )
        with torch.no_grad():
            u = self._tokens(x)
            draw = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))[:count]
            self.anchors.copy_(u[0, :, draw.to(u.device)])
            near = self._near(u, None)
            self.means.copy_(near.mean((0, 2)))
            near = near - self.means.to(near)[:, None]
            alike = u @ u.mT
            wanted = torch.zeros_like(alike)
            for largest in (True, False):
                at = alike.topk(nearest, dim=-1, largest=largest).indices
                wanted.scatter_(-1, at, float(self.bits) if largest else -float(self.bits))
        losses = []
        for bit in range(self.bits):
            kept, y, loss = self._descended(near, wanted, self.hashes[:, bit].to(near))
            self.hashes[:, bit].copy_(kept)
            wanted = wanted - y[..., :, None] * y[..., None, :]
            losses.append(loss)
        return losses

    def _descended(self, near: Tensor, wanted: Tensor, start: Tensor) -> tuple[Tensor, Tensor, float]:
        """The better of a bit's start [h, m] and what descent makes of it; its y [b, h, n]; its loss."""

        def cost(y: Tensor) -> Tensor:
            return -(y[..., None, :] @ wanted @ y[..., None]).mean() / (y.shape[-1] * self.bits)

        def hard(a: Tensor) -> Tensor:
            return torch.where((near @ a[..., None])[..., 0] > 0, 1.0, -1.0).to(near.dtype)

        with torch.enable_grad():
            a = start.detach().clone().requires_grad_(True)
            optimizer = torch.optim.SGD([a], lr=RATE, momentum=MOMENTUM, nesterov=True)
            for _ in range(STEPS):
                optimizer.zero_grad()
                cost(2 * (near @ a[..., None])[..., 0].sigmoid() - 1).backward()
                optimizer.step()
        before, after = (float(cost(hard(own))) for own in (start, a.detach()))
        best = a.detach() if after < before else start
        return best, hard(best), min(before, after)


def _bits(z: Tensor) -> Tensor:
    """Zeros and ones, with a gradient of one where z is from 0 to 1."""
    soft = z.clamp(0, 1)
    return (z > 0).to(z.dtype) + (soft - soft.detach())
