"""The Hyena operator, as HyenaDNA has it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.layers import call_in
from manyheads.functional.linear import widen
from manyheads.functional.shift import causal_taps
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.state import State

# New tokens that are convolved with all earlier ones directly; more of them go through a Fourier transform.
FEW = 8


def long_convolution(u: Tensor, kernel: Tensor, n: int) -> Tensor:
    """y_t = sum over l <= t of kernel_l u_(t - l), the last n of m tokens: u [b, m, e], kernel [m, e] -> [b, n, e]."""
    m = u.shape[1]
    if n <= FEW:
        rows = [(u[:, : t + 1] * kernel[: t + 1].flip(0)).sum(1) for t in range(m - n, m)]
        return torch.stack(rows, 1)
    # Twice the length: the far end must not wrap around to the first tokens.
    product = torch.fft.rfft(u, 2 * m, 1) * torch.fft.rfft(kernel, 2 * m, 0)
    return torch.fft.irfft(product, 2 * m, 1)[:, m - n : m]


@register
class Hyena(Mechanism):
    """Attention's place taken by a chain of long convolutions with implicit filters and gates read from the input.

        x_0, .., x_(N-1), v = short(W_in x);  for i = N-1 .. 1: v <- h_i * (v x_i) + b_i (v x_i);  y = W_out (v x_0)
        h_i(t) = MLP_i(t, cos, sin of bands) (exp(-|delta_i| t) + shift),  t = position / (max_length - 1)

    short: a depthwise causal convolution of three taps. The filters' MLP has two inner layers with sines of one shared,
    learned frequency. normalized: h(t) over the sum of |h(t)| of all orders and channels. learned_positions: the MLP's
    input is a parameter, which wants no weight decay. heads: of no meaning; there is no matrix of weights. State: the
    inputs of every long convolution; a token costs time in all tokens before it.
    Source: Poli et al., arXiv:2302.10866 (safari); Nguyen et al., HyenaDNA, arXiv:2306.15794, whose sizes are the
    defaults here. Time is relative to max_length, not to the length given. shift is 0 where HyenaDNA is trained, 0.05
    in the standalone file that runs its weights. safari normalises before the window, HyenaDNA and this after it. The
    codes learn the input or delta where given a learning rate for it; here delta always is.
    Weights: h_i is number N - 1 - i of the code, whose last rows, deltas and bias go by (channel, number), in the
    standalone file by (number, channel); here all go by (i - 1, channel). Tap l is its tap 2 - l, positions its z[0].
    """

    card = Card(
        name="hyena",
        title="HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution",
        reference="arXiv:2306.15794",
        family=Family.RECURRENT,
        patterns={"causal-self"},
        time="n log n",
        state="n",
        example={"max_length": 128, "filter_dim": 8, "order": 3},
        notes="Takes at most max_length tokens. Decoding costs time in the length, per token, since a filter has no "
        "recurrence; dense masks are refused. Its filters do not depend on the content, and gates alone look "
        "nothing up: 1% on quick recall, 7% in five times the steps.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        order: int = 2,
        max_length: int = 4096,
        filter_dim: int = 64,
        bands: int = 2,
        frequency: float = 10.0,
        shift: float = 0.0,
        normalized: bool = False,
        learned_positions: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if order < 2 or max_length < 2 or filter_dim < 1 or bands < 1:
            raise ValueError(
                f"hyena: order={order}, max_length={max_length}, filter_dim={filter_dim}, bands={bands}; want order "
                "and max_length of at least 2, filter_dim and bands of at least 1"
            )
        self.order, self.max_length, self.bands = order, max_length, bands
        self.shift, self.normalized = shift, normalized
        self.in_proj = nn.Linear(dim, (order + 1) * dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)
        self.short_taps = nn.Parameter(torch.empty((order + 1) * dim, 3).uniform_(-(3**-0.5), 3**-0.5))
        self.short_bias = nn.Parameter(torch.zeros((order + 1) * dim))
        sizes = [2 * bands + 1, filter_dim, filter_dim, filter_dim]
        self.inner = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.last = nn.Linear(filter_dim, (order - 1) * dim, bias=False)
        self.frequency = nn.Parameter(torch.full((filter_dim,), float(frequency)))
        fast, slow = math.log(0.01) / 0.3, math.log(0.01) / 1.5
        # transformers takes torch.linspace out of what torch.device() moves, for good: the device is named.
        rates = torch.linspace(slow, fast, (order - 1) * dim, device=self.frequency.device)
        # The first filter to be applied is that of the last order.
        self.delta = nn.Parameter(rates.view(dim, -1).mT.flip(0).contiguous())
        start = (
            _positions(torch.arange(max_length, dtype=torch.float64), max_length, bands) if learned_positions else None
        )
        self.positions = None if start is None else nn.Parameter(start.to(self.delta.dtype))
        self.skip = nn.Parameter(torch.randn(order - 1, dim))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"hyena: a dense mask of shape {tuple(call.dense.shape)} was given, but its convolutions carry every "
                "token on; give key padding [batch, n] as the mask"
            )
        length = call.seen + x.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"hyena: {length} tokens, but its filters reach over max_length={self.max_length}; build it with a "
                "larger max_length"
            )
        projected = self._hide(widen(self.in_proj(x)), call)
        short = causal_taps(projected, widen(self.short_taps), call.state, "short") + widen(self.short_bias)
        *gates, v = short.chunk(self.order + 1, -1)
        filters, skips = self._filters(length, v), widen(self.skip)
        for i in range(self.order - 1, 0, -1):
            u = self._hide(v * gates[i], call)
            past = self._append(call.state, f"inputs_{i}", u)
            v = long_convolution(past, filters[i - 1], x.shape[1]) + skips[i - 1] * u
        if call.state is not None:
            call.state.advance(x.shape[1])
        return Result(self.out_proj((v * gates[0]).to(x.dtype)))

    def _filters(self, length: int, like: Tensor) -> Tensor:
        """[order - 1, length, dim]."""
        place = torch.arange(length, device=like.device, dtype=like.dtype)
        if self.positions is None:
            z = _positions(place, self.max_length, self.bands)
        else:
            z = self.positions[:length].to(like.dtype)
        for layer in self.inner:
            z = (self.frequency.to(like.dtype) * call_in(layer, z)).sin()
        time = place[:, None, None] / (self.max_length - 1)
        window = (-time * self.delta.to(like.dtype).abs()).exp() + self.shift
        filters = call_in(self.last, z).unflatten(-1, (self.order - 1, -1)) * window
        if self.normalized:
            total = filters.abs().sum((-2, -1), keepdim=True)
            filters = filters / total.clamp(min=torch.finfo(total.dtype).tiny)
        return filters.transpose(0, 1)

    def _append(self, state: State | None, name: str, rows: Tensor) -> Tensor:
        return rows if state is None else state.append(name, rows)

    def _hide(self, rows: Tensor, call: Call) -> Tensor:
        return rows if call.padding is None else rows.masked_fill(~call.padding[..., None], 0.0)


def _positions(place: Tensor, length: int, bands: int) -> Tensor:
    """place [n], of at most `length` -> what a filter's MLP reads of each, [n, 2 bands + 1]."""
    waves = torch.linspace(1e-4, bands - 1, bands, device=place.device, dtype=place.dtype)
    angle = 2 * torch.pi / length * place[:, None] * waves
    return torch.cat((place[:, None] / (length - 1), angle.cos(), -angle.sin()), -1)
