"""Sparse modular activation: a recurrence decides which tokens attend at all."""

from __future__ import annotations

from typing import Any, NamedTuple

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

NORMALISERS = ("relu2", "softmax")
# Queries whose weights are held at once.
ROWS = 64


class _Keys(NamedTuple):
    """Active tokens without gaps: keys and values [b, h, c, d], which slots hold one and its place in the sequence,
    [b, c] each."""

    keys: Tensor
    values: Tensor
    real: Tensor
    places: Tensor


@register
class SeqBoat(Mechanism):
    """A moving average runs over all tokens and switches local attention on for some; the others skip it.

        x' = silu(EMA(x) + omega x);  p = softmax(W_u x' / exp(t));  token i is active if p_i1 > p_i0
        among the active tokens, as if they stood side by side: z, r, v = silu(W x');  q, k = kappa z + mu;
        h_i = p_i1 W_h(r_i sum over their window of f(q_i . k_j) v_j) if i is active, else 0
        y = silu(W_y x' + h + x)

    f: "relu2" (relu(q . k / w)^2, not normalised; w = window, or 2 window noncausal) or "softmax" (q . k / sqrt(d)).
    window: an active token sees that many active ones before it, and itself (noncausal: as many after it). q and k are
    turned by the places in the whole sequence. The state holds the average and the newest `window` active tokens.
    heads splits z and v; the paper has one. Source: arXiv:2306.11197 and its released code, with its rotary option
    instead of the table of biases, which has a longest length. Divergence: x is what the block normed; the code norms
    inside, and the x that it adds is the residual before the norm.
    Weights: as in Mega ema_alpha is the code's delta, ema_delta its alpha, ema_eta its gamma, with the directions in
    front; kappa, mu are its gamma, beta; y_proj is hx_proj, in_proj is mx_proj, row by row.
    """

    card = Card(
        name="seqboat",
        title="Sparse Modular Activation for Efficient Sequence Modeling",
        reference="arXiv:2306.11197",
        family=Family.SELECTION,
        patterns={"noncausal-self", "causal-self"},
        time="n w",
        state="w",
        example={"window": 3, "ema_dim": 3},
        notes="Weights are those among active tokens, before their gate; the moving average is beside them. A third "
        "of the tokens is inactive at first, and no key for others: 1% on quick recall, 11% in five times the "
        "steps.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 256,
        normaliser: str = "relu2",
        ema_dim: int = 16,
        z_dim: int | None = None,
        v_dim: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        z_dim = max(2, dim // (2 * heads) // 2 * 2) * heads if z_dim is None else z_dim
        v_dim = 2 * dim // heads * heads if v_dim is None else v_dim
        if normaliser not in NORMALISERS or min(window, ema_dim) < 1:
            raise ValueError(
                f"{self.card.name}: normaliser={normaliser!r}, window={window}, ema_dim={ema_dim}; want one of "
                f"{list(NORMALISERS)} and positive sizes"
            )
        if z_dim < 1 or z_dim % (2 * heads) or v_dim < 1 or v_dim % heads:
            raise ValueError(
                f"{self.card.name}: z_dim={z_dim}, v_dim={v_dim} for heads={heads}; want z_dim a multiple of "
                f"{2 * heads} (its features are turned in pairs) and v_dim a multiple of {heads}"
            )
        self.window, self.normaliser, self.z_dim, self.v_dim = window, normaliser, z_dim, v_dim
        both = (1 if causal else 2, dim, ema_dim)  # one average from the left, and one from the right
        self.ema_alpha = nn.Parameter(0.2 * torch.randn(both))
        self.ema_delta = nn.Parameter(0.2 * torch.randn(both))
        self.ema_beta = nn.Parameter((-1.0) ** torch.arange(ema_dim) + 0.02 * torch.randn(both))
        self.ema_eta = nn.Parameter(torch.randn(both))
        self.omega = nn.Parameter(torch.randn(dim))
        self.temperature = nn.Parameter(torch.tensor(dim**0.5).log())
        self.y_proj = nn.Linear(dim, 2 + dim)
        self.in_proj = nn.Linear(dim, z_dim + 2 * v_dim)
        self.h_proj = nn.Linear(v_dim, dim)
        for linear in (self.y_proj, self.in_proj, self.h_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02, a=-0.04, b=0.04)
            nn.init.zeros_(linear.bias)
        self.kappa = nn.Parameter(0.02 * torch.randn(2, z_dim))
        self.mu = nn.Parameter(torch.zeros(2, z_dim))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"{self.card.name}: a dense mask was given, but the moving average carries every token on; give key "
                "padding [batch, n] as the mask"
            )
        moved = self._move(x, call)
        logits, straight = self.y_proj(moved).split([2, self.dim], -1)
        probs = (logits / self.temperature.exp()).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        active = probs[..., 1] > probs[..., 0]
        active = active if call.padding is None else active & call.padding
        gate = (probs[..., 1] * active).to(x.dtype)
        h, weights = self._among_active(moved, active, call)
        if call.state is not None:
            call.state.advance(x.shape[1])
        return Result(F.silu(straight + gate[..., None] * h + x), weights)

    def _move(self, x: Tensor, call: Call) -> Tensor:
        """silu(EMA(x) + omega x) [b, n, e], in at least float32; padded tokens add nothing."""
        wide = torch.promote_types(x.dtype, torch.float32)
        seen = (x if call.padding is None else x.masked_fill(~call.padding[..., None], 0.0)).to(wide)
        step = self.ema_alpha.to(wide).sigmoid()
        decay, gain = 1 - step * self.ema_delta.to(wide).sigmoid(), step * self.ema_beta.to(wide)
        out = self.ema_eta.to(wide) * self.ema_eta.shape[-1] ** -0.5
        carried = None if call.state is None else call.state.fixed.get("ema")
        y, carried = damped_ema(seen, decay[0], gain[0], out[0], carried)
        if call.state is not None:
            call.state.fixed["ema"] = carried.clone()
        if not self.causal:
            y = y + damped_ema(seen.flip(1), decay[1], gain[1], out[1])[0].flip(1)
        return F.silu(y + self.omega.to(wide) * x.to(wide)).to(x.dtype)

    # -- among the active tokens -----------------------------------------------------------------------------------

    def _among_active(self, moved: Tensor, active: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """h without its gate [b, n, e], zero where no row was active, and the weights [b, h, n, seen + n]."""
        (b, n, _), count = moved.shape, active.sum(1)
        # Active tokens to the front, as many rows as the fullest of the batch has: a compiler cannot know how many.
        fullest = n if torch.compiler.is_compiling() else max(int(count.max()), 1)
        order = (~active).int().sort(dim=1, stable=True).indices[:, :fullest]
        rows = moved.gather(1, order[..., None].expand(-1, -1, self.dim))
        z, r, v = F.silu(self.in_proj(rows)).split([self.z_dim, self.v_dim, self.v_dim], -1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.kappa[0] * z + self.mu[0], self.kappa[1] * z + self.mu[1], v)
        )
        positions = call.query_positions(moved).expand(b, -1).gather(1, order)
        q, k = (rotate(t, positions, Rotary(interleaved=True)) for t in (q, k))
        real = torch.arange(order.shape[1], device=moved.device) < count[:, None]
        new = _Keys(k, v, real, order + call.seen)
        held = self._held(new, call.state)
        keys = _Keys(*(torch.cat([old, own], 2 if own.ndim == 4 else 1) for old, own in zip(held, new, strict=True)))
        if call.state is not None:
            call.state.fixed.update(_newest(keys, count, self.window)._asdict())
        mixed, weights = [], []
        for start in range(0, order.shape[1], ROWS):
            weight, part = self._weights(q[:, :, start : start + ROWS], keys, start)
            mixed.append(weight @ keys.values[:, :, part])
            if call.need_weights:
                wide = weight.new_zeros(*weight.shape[:3], call.seen + n)
                weights.append(wide.scatter_add(3, keys.places[:, None, None, part].expand_as(weight), weight))
        h = self.h_proj(torch.cat(mixed, 2).transpose(1, 2).flatten(-2) * r)
        h = h.new_zeros(moved.shape).scatter(1, order[..., None].expand_as(h), h)
        if not weights:
            return h, None
        found = torch.cat(weights, 2).masked_fill(~real[:, None, :, None], 0.0)
        full = found.new_zeros(b, self.heads, n, found.shape[-1])
        return h, full.scatter(2, order[:, None, :, None].expand_as(found), found)

    def _held(self, new: _Keys, state: State | None) -> _Keys:
        """The newest active tokens of the passes before, right up to the first new one; free slots come first."""
        if state is not None and "keys" in state.fixed:
            return _Keys(*(state.fixed[name] for name in _Keys._fields))
        slots = self.window if self.causal else 0
        b, h = new.keys.shape[:2]
        return _Keys(
            new.keys.new_zeros(b, h, slots, new.keys.shape[-1]),
            new.values.new_zeros(b, h, slots, new.values.shape[-1]),
            new.real.new_zeros(b, slots),
            new.places.new_zeros(b, slots),
        )

    def _weights(self, q: Tensor, keys: _Keys, start: int) -> tuple[Tensor, slice]:
        """q [b, h, r, d], rows from `start` on of the new tokens -> weights on a slice of the keys, and the slice."""
        before = self.window if self.causal else 0  # slots of earlier passes
        first = max(start + before - self.window, 0)
        last = min(start + before + q.shape[2] + (0 if self.causal else self.window), keys.real.shape[1])
        own = torch.arange(start + before, start + before + q.shape[2], device=q.device)[:, None]
        lag = own - torch.arange(first, last, device=q.device)
        near = (lag >= 0) & (lag <= self.window) if self.causal else lag.abs() <= self.window
        allowed = near & keys.real[:, None, None, first:last]
        scores = q @ keys.keys[:, :, first:last].mT
        if self.normaliser == "softmax":
            return masked_softmax(scores * q.shape[-1] ** -0.5, allowed), slice(first, last)
        scores = scores / (self.window if self.causal else 2 * self.window)
        return scores.relu().square().masked_fill(~allowed, 0.0), slice(first, last)


def _newest(keys: _Keys, count: Tensor, window: int) -> _Keys:
    """The last `window` slots of each row, which ends `count` behind those held before."""
    index = count[:, None] + torch.arange(window, device=count.device)

    def take(rows: Tensor) -> Tensor:
        return rows.gather(2, index[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[-1]))

    return _Keys(take(keys.keys), take(keys.values), keys.real.gather(1, index), keys.places.gather(1, index))
