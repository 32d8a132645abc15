"""Mega: moving average equipped gated attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.ema import damped_ema
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.rotary import Rotary, rotate
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.state import State

NORMALISERS = ("softmax", "laplace")
# Tokens, or a chunk more, of a long causal pass that are worked on at once: what lies between stays in the cache.
STRETCH = 2048


@register
class Mega(Mechanism):
    """Gated attention whose queries and keys are read from a damped moving average, which says where tokens stand.

        x' = silu(EMA(x) + omega x);  z = silu(W_z x');  q, k = kappa z + mu;  v = silu(W_v x)
        o = f(q k^T + b) v;  h = silu(W_h x' + U (r o)), r = silu(W_r x');  y = phi h + (1 - phi) x, phi = sigmoid(W x')

    f: "softmax" (q k^T / sqrt(d)) or "laplace" (q k^T / number of keys, then (1 + erf((s - mu) / (sigma sqrt 2))) / 2,
    not normalised). chunk: attention stays within stretches of so many positions (linear, constant state); None: all.
    b is the learned rotary bias, not the Toeplitz table: it has no longest length. Noncausal: a second EMA from the
    right. heads splits z and v; the paper has one.
    Matrix: f(q k^T + b); the EMA, which reaches beyond the chunk, is beside them.

    Source: Ma et al., arXiv:2209.10655, and its code: silu and 1 / sqrt(ema_dim) inside the EMA, and both EMAs counting
    the token itself. Divergence: x is what the block normed; the code norms inside, and its (1 - phi) x is the residual
    before the norm. mu = sqrt(1 / 2), sigma = sqrt(1 / (4 pi)) are exact here, 0.707107 and 0.282095 there.
    Weights: the code has the paper's alpha and delta the other way round: ema_alpha is its delta, ema_delta its alpha,
    ema_eta its gamma, [direction, dim, ema_dim], where it has one direction after the other in [2 dim, ema_dim]; kappa,
    mu are its gamma, beta; place[0, 0], place[1, 0] its rotary alpha, beta; ema_proj is mx_proj, row by row.
    """

    card = Card(
        name="mega",
        title="Mega: Moving Average Equipped Gated Attention",
        reference="arXiv:2209.10655",
        family=Family.RECURRENT,
        patterns={"noncausal-self", "causal-self"},
        time="n chunk",
        state="1",
        example={"chunk": 4, "ema_dim": 3},
        notes="With chunk=None time is n^2 and the state n. Slower to learn lookup than softmax: 32% on quick "
        "recall, 96% in five times the steps.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        chunk: int | None = 128,
        normaliser: str = "softmax",
        ema_dim: int = 16,
        z_dim: int | None = None,
        v_dim: int | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        z_dim = max(2, dim // 2 // (2 * heads) * 2) * heads if z_dim is None else z_dim
        v_dim = 2 * dim // heads * heads if v_dim is None else v_dim
        self._check(chunk, normaliser, ema_dim, z_dim, v_dim)
        self.chunk, self.normaliser, self.z_dim, self.v_dim = chunk, normaliser, z_dim, v_dim
        both = (1 if causal else 2, dim, ema_dim)  # one EMA from the left, and one from the right
        self.ema_alpha = nn.Parameter(0.2 * torch.randn(both))
        self.ema_delta = nn.Parameter(0.2 * torch.randn(both))
        signs = (-1.0) ** torch.arange(ema_dim)
        self.ema_beta = nn.Parameter(signs + 0.02 * torch.randn(both))
        self.ema_eta = nn.Parameter(torch.randn(both))
        self.omega = nn.Parameter(torch.randn(dim))
        self.v_proj = nn.Linear(dim, v_dim)
        self.ema_proj = nn.Linear(dim, 2 * dim + z_dim + v_dim)
        self.h_proj = nn.Linear(v_dim, dim)
        for linear in (self.v_proj, self.ema_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.kappa = nn.Parameter(0.02 * torch.randn(2, z_dim))
        self.mu = nn.Parameter(torch.zeros(2, z_dim))
        self.place = nn.Parameter(0.02 * torch.randn(2, heads, z_dim // heads))

    def _check(self, chunk: int | None, normaliser: str, ema_dim: int, z_dim: int, v_dim: int) -> None:
        name, heads = self.card.name, self.heads
        if normaliser not in NORMALISERS:
            raise ValueError(f"{name}: normaliser={normaliser!r}; want one of {list(NORMALISERS)}")
        if ema_dim < 1 or (chunk is not None and chunk < 1):
            raise ValueError(
                f"{name}: ema_dim={ema_dim}, chunk={chunk}; both must be positive (chunk=None for no chunks)"
            )
        if z_dim < 1 or z_dim % (2 * heads) or v_dim < 1 or v_dim % heads:
            raise ValueError(
                f"{name}: z_dim={z_dim}, v_dim={v_dim} for heads={heads}; want z_dim a multiple of {2 * heads} "
                f"(its features are turned in pairs) and v_dim a multiple of {heads}"
            )

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"{self.card.name}: a dense mask was given, but the moving average carries every token on; "
                "give key padding [batch, n] as the mask"
            )
        if self.chunk is not None and self.causal and not call.need_weights:
            stretch = -(-STRETCH // self.chunk) * self.chunk
            if x.shape[1] > stretch:
                return Result(self._in_stretches(x, call, stretch))
        moved = self._move(x, call)
        phi, z, r, h = self.ema_proj(moved).split([self.dim, self.z_dim, self.v_dim, self.dim], -1)
        z = F.silu(z)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.kappa[0] * z + self.mu[0], self.kappa[1] * z + self.mu[1], F.silu(self.v_proj(x)))
        )
        mixed, weights = self._attend_chunks(q, k, v, call)
        h = F.silu(h + self.h_proj(mixed * F.silu(r)))
        return Result(torch.lerp(x, h, phi.sigmoid()), weights)

    def _in_stretches(self, x: Tensor, call: Call, stretch: int) -> Tensor:
        """A long pass as several with a state."""
        state = self.init_state(x.shape[0]) if call.state is None else call.state
        outputs = []
        for start in range(0, x.shape[1], stretch):
            padding, positions = (
                None if given is None else given[:, start : start + stretch] for given in (call.padding, call.positions)
            )
            now = replace(call, padding=padding, positions=positions, state=state)
            outputs.append(self.attend(x[:, start : start + stretch], None, now).output)
        return torch.cat(outputs, 1)

    # -- the moving average ----------------------------------------------------------------------------------------

    def _move(self, x: Tensor, call: Call) -> Tensor:
        """silu(EMA(x) + omega x) [b, n, e], in at least float32; padded tokens add nothing."""
        wide = torch.promote_types(x.dtype, torch.float32)
        seen = x if call.padding is None else x.masked_fill(~call.padding[..., None], 0.0)
        seen = seen.to(wide)
        step = self.ema_alpha.to(wide).sigmoid()
        decay = 1 - step * self.ema_delta.to(wide).sigmoid()
        gain = step * self.ema_beta.to(wide)
        out = self.ema_eta.to(wide) * self.ema_eta.shape[-1] ** -0.5
        carried = None if call.state is None else call.state.fixed.get("ema")
        y, carried = damped_ema(seen, decay[0], gain[0], out[0], carried)
        if call.state is not None:
            call.state.fixed["ema"] = carried.clone()
        if not self.causal:
            y = y + damped_ema(seen.flip(1), decay[1], gain[1], out[1])[0].flip(1)
        return F.silu(y + self.omega.to(wide) * x.to(wide)).to(x.dtype)

    # -- attention -------------------------------------------------------------------------------------------------

    def _attend_chunks(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """q, k [b, h, n, z], v [b, h, n, d] -> [b, n, h d] and the matrix [b, h, n, seen + n].

        Queries go in blocks; each meets the keys that can share a chunk with one of them, of which a mask by chunk
        number keeps those that do. Chunks begin anywhere where positions are given, else blocks can be the chunks.
        """
        b, n, seen = q.shape[0], q.shape[2], call.seen
        positions = torch.arange(seen, seen + n, device=q.device)[None] if call.positions is None else call.positions
        q_place, k = self._place(k, positions)
        chunk_of = (positions * 0 if self.chunk is None else positions // self.chunk).expand(b, -1)
        labels = chunk_of if call.padding is None else chunk_of.masked_fill(~call.padding, -1)
        aligned = self.chunk is not None and call.positions is None and seen % self.chunk == 0
        block = n if self.chunk is None else min(self.chunk, n)
        k, v, labels, before = self._reach_back(k, v, labels, call.state, aligned)
        after = 0 if self.causal or aligned or self.chunk is None else self.chunk - 1
        size, short = before + block + after, -n % block
        q, q_place = (_blocks(F.pad(t, (0, 0, 0, short)), block, block) for t in (q, q_place))
        k, v = (_blocks(F.pad(t, (0, 0, 0, short + after)), size, block) for t in (k, v))
        asked = F.pad(chunk_of, (0, short)).unfold(1, block, block)
        allowed = (
            asked[..., :, None] == F.pad(labels, (0, short + after), value=-1).unfold(1, size, block)[..., None, :]
        )
        if self.causal:
            allowed = allowed & torch.ones(block, size, dtype=torch.bool, device=q.device).tril(before)
        weights = self._weigh(q, q_place, k, allowed.flatten(0, 1)[:, None])
        mixed = (weights @ v).transpose(1, 2).reshape(b, -1, self.v_dim)[:, :n]
        return mixed, _matrix(weights, n, seen, before, b) if call.need_weights else None

    def _place(self, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' side of the bias b, and k with the keys' side behind it: b is their scalar product."""
        within = positions if self.chunk is None else positions % self.chunk  # small angles stay exact
        side = self.place[:, None, :, None].to(k.dtype).expand(-1, -1, -1, k.shape[2], -1)
        q_place, k_place = (rotate(one, within, Rotary()).expand_as(k) for one in side)
        return q_place, torch.cat([k, k_place], -1)

    def _weigh(self, q: Tensor, q_place: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
        """f(q k^T + b); the last half of k's features holds the keys' side of b."""
        if self.normaliser == "softmax":
            q = q * (self.z_dim // self.heads) ** -0.5
            return masked_softmax(torch.cat([q, q_place], -1) @ k.transpose(-1, -2), allowed)
        count = allowed.sum(-1, keepdim=True).clamp(min=1)
        scores = torch.cat([q / count.to(q.dtype), q_place], -1) @ k.transpose(-1, -2)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32))
        # mu = sqrt(1 / 2), sigma = sqrt(1 / (4 pi)): the values that come nearest to a squared ReLU.
        weights = 0.5 * (1 + torch.erf((scores - 0.5**0.5) * (2 * torch.pi) ** 0.5))
        return (weights * allowed).to(q.dtype)

    def _reach_back(
        self, k: Tensor, v: Tensor, labels: Tensor, state: State | None, aligned: bool
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """k, v, labels with the `before` tokens in front that the first query can meet, and `before`.

        A state keeps every token, or where chunked the last chunk - 1.
        """
        n = labels.shape[1]
        if self.chunk is None:
            if state is None:
                return k, v, labels, 0
            held = state.append("keys", k), state.append("values", v), state.append("labels", labels)
            state.advance(n)
            return *held, state.length - n
        before = self.chunk - 1
        alone = k, v, labels, 0
        if state is None and aligned:
            return alone
        if state is None or "keys" not in state.fixed:
            k, v, labels = _ahead(k, v, labels, before)
        else:
            k, v = (torch.cat([state.fixed[name], t], 2) for name, t in (("keys", k), ("values", v)))
            labels = torch.cat([state.fixed["labels"], labels], 1)
        if state is not None:
            for name, t in (("keys", k[:, :, n:]), ("values", v[:, :, n:]), ("labels", labels[:, n:])):
                state.fixed[name] = t.clone()  # a view would keep the whole pass alive
            state.advance(n)
        return alone if aligned else (k, v, labels, before)


def _ahead(k: Tensor, v: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for `rows` tokens in front, which belong to no chunk."""
    return F.pad(k, (0, 0, rows, 0)), F.pad(v, (0, 0, rows, 0)), F.pad(labels, (rows, 0), value=-1)


def _blocks(t: Tensor, size: int, step: int) -> Tensor:
    """[b, h, m, d] -> windows [b blocks, h, size, d]."""
    return t.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _matrix(weights: Tensor, n: int, seen: int, before: int, batch: int) -> Tensor:
    """Weights of blocks [b blocks, h, block, size] -> [b, h, n, seen + n]."""
    block, size = weights.shape[-2:]
    weights = weights.unflatten(0, (batch, -1)).transpose(1, 2)
    first = torch.arange(weights.shape[2], device=weights.device) * block + seen - before
    columns = (first[:, None] + torch.arange(size, device=weights.device)).clamp(0, seen + n - 1)
    empty = weights.new_zeros(*weights.shape[:4], seen + n)
    # What falls outside has no weight, so that it may be counted to the rim.
    return empty.scatter_add(-1, columns[:, None].expand_as(weights), weights).flatten(2, 3)[:, :, :n]
