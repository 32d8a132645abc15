"""Hyena: the chain of convolutions and its filters as loops, the two ways to convolve, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.recurrent.hyena import Hyena, long_convolution


def built(**config: object) -> Hyena:
    torch.manual_seed(0)
    module = Hyena(4, 2, **{"max_length": 20, "filter_dim": 5, **config}).double()
    with torch.no_grad():
        module.short_bias.normal_()
        module.skip.normal_()
        if module.positions is not None:
            module.positions.add_(torch.randn_like(module.positions))
    return module


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def filter_at(module: Hyena, t: int) -> list[list[float]]:
    """[order - 1][dim], from scalars."""
    bands, length = module.bands, module.max_length
    waves = [1e-4 + b * (bands - 1 - 1e-4) / max(bands - 1, 1) for b in range(bands)]
    z = [t / (length - 1)]
    z += [math.cos(2 * math.pi * t / length * f) for f in waves]
    z += [-math.sin(2 * math.pi * t / length * f) for f in waves]
    if module.positions is not None:
        z = module.positions[t].tolist()
    for layer in module.inner:
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), module.frequency.tolist(), strict=True)
        z = [math.sin(w * (sum(a * b for a, b in zip(row, z, strict=True)) + c)) for row, c, w in rows]
    flat = [sum(a * b for a, b in zip(row, z, strict=True)) for row in module.last.weight.tolist()]
    h = [
        [flat[o * 4 + e] * (math.exp(-abs(deltas[e]) * t / (length - 1)) + module.shift) for e in range(4)]
        for o, deltas in enumerate(module.delta.tolist())
    ]
    total = sum(abs(value) for row in h for value in row) if module.normalized else 1.0
    return [[value / total for value in row] for row in h]


def by_loops(module: Hyena, x: Tensor) -> Tensor:
    n, order, out = x.shape[1], module.order, torch.zeros_like(x)
    filters = [filter_at(module, t) for t in range(n)]
    rows, taps, extra = module.in_proj(x).tolist(), module.short_taps.tolist(), module.short_bias.tolist()
    for b in range(x.shape[0]):
        short = [
            [
                extra[c] + sum(taps[c][lag] * rows[b][t - lag][c] for lag in range(min(3, t + 1)))
                for c in range(len(extra))
            ]
            for t in range(n)
        ]
        for e in range(4):
            v = [short[t][order * 4 + e] for t in range(n)]
            for i in range(order - 1, 0, -1):
                u = [v[t] * short[t][i * 4 + e] for t in range(n)]
                v = [
                    sum(filters[lag][i - 1][e] * u[t - lag] for lag in range(t + 1))
                    + float(module.skip[i - 1, e]) * u[t]
                    for t in range(n)
                ]
            out[b, :, e] = torch.tensor([v[t] * short[t][e] for t in range(n)], dtype=x.dtype)
    return module.out_proj(out)


OPTIONS = [{"shift": 0.05}, {"order": 3, "normalized": True}, {"learned_positions": True, "shift": 0.05}]


@pytest.mark.parametrize(
    "config", [{}, {"order": 3}, {"order": 4, "bands": 3}, {"bands": 1, "frequency": 1.0}, *OPTIONS]
)
@pytest.mark.parametrize("n", [3, 13])
@torch.no_grad()
def test_equals_the_chain(config: dict[str, object], n: int) -> None:
    module, x = built(**config), tokens(n)
    assert_close(module(x).output, by_loops(module, x))


@pytest.mark.parametrize(("m", "n"), [(5, 5), (9, 2), (30, 30), (30, 9), (30, 1)])
@torch.no_grad()
def test_both_ways_to_convolve_are_the_sum(m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(m)
    u = torch.randn(2, m, 3, dtype=torch.float64, generator=generator)
    kernel = torch.randn(m, 3, dtype=torch.float64, generator=generator)
    wanted = torch.zeros(2, n, 3, dtype=torch.float64)
    for row, t in enumerate(range(m - n, m)):
        for lag in range(t + 1):
            wanted[:, row] += kernel[lag] * u[:, t - lag]
    assert_close(long_convolution(u, kernel, n), wanted)


@torch.no_grad()
def test_a_filter_depends_on_the_longest_length_and_not_on_the_given_one() -> None:
    x = tokens(15)
    module = built()
    assert_close(module(x[:, :9]).output, module(x).output[:, :9])
    other = built(max_length=40)
    other.load_state_dict(module.state_dict())
    assert (other(x).output - module(x).output).abs().max() > 1e-4


def test_decays_of_each_order_span_the_whole_range() -> None:
    """As the code deals them out: channel by channel, and within it from the order that is applied first."""
    fast, slow = math.log(0.01) / 0.3, math.log(0.01) / 1.5
    dealt = [slow + (fast - slow) * step / 11 for step in range(12)]
    delta = Hyena(4, 2, order=4).delta
    assert_close(delta, torch.tensor([[dealt[3 * e + 2 - i] for e in range(4)] for i in range(3)]))


@torch.no_grad()
def test_learned_positions_start_as_the_others() -> None:
    x, plain, learned = (
        tokens(15),
        built(order=3),
        Hyena(4, 2, max_length=20, filter_dim=5, order=3, learned_positions=True),
    )
    missing, unexpected = learned.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["positions"], [])
    assert_close(learned.double()(x).output, plain(x).output, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_layout_of_released_weights() -> None:
    """A filter computed from tensors as HyenaDNA holds them, for both of its orders of rows."""
    dim, order = 4, 4
    module = built(order=order, shift=0.05, learned_positions=True)
    generator = torch.Generator().manual_seed(3)
    rows, deltas = (torch.randn((order - 1) * dim, *s, dtype=torch.float64, generator=generator) for s in [(5,), ()])
    hidden = module.positions
    for layer in module.inner:
        hidden = (module.frequency * layer(hidden)).sin()
    time = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    flat = hidden @ rows.T * ((-time * deltas.abs()).exp() + 0.05)
    for split in (
        lambda t: t.unflatten(0, (dim, order - 1)).transpose(0, 1),
        lambda t: t.unflatten(0, (order - 1, dim)),
    ):
        module.last.weight.copy_(split(rows).flip(0).flatten(0, 1))
        module.delta.copy_(split(deltas).flip(0))
        theirs = split(flat.T)  # theirs[0] is applied first, with the last gate
        assert_close(module._filters(20, hidden).transpose(1, 2), theirs.flip(0))


@torch.no_grad()
def test_without_filters_it_is_gates_and_skips() -> None:
    module, x = built(order=3), tokens(6)
    module.last.weight.zero_()
    module.short_taps.zero_()
    module.short_taps[:, 0] = 1.0
    module.short_bias.zero_()
    x_0, x_1, x_2, v = module.in_proj(x).chunk(4, -1)
    wanted = module.out_proj(v * x_2 * module.skip[1] * x_1 * module.skip[0] * x_0)
    assert_close(module(x).output, wanted)


@torch.no_grad()
def test_a_token_that_is_not_there_is_a_zero_in_every_convolution() -> None:
    module, x = built(order=3), tokens(12)
    mask = torch.arange(12) >= 4
    garbage = torch.where(mask[:, None], x, 1e3)
    assert_close(module(garbage, mask=mask.expand(2, -1)).output[:, 4:], module(x[:, 4:]).output)


def test_more_than_its_length_is_refused_in_a_pass_and_in_a_state() -> None:
    module = built()
    with pytest.raises(ValueError, match="hyena: 21 tokens, but its filters reach over max_length=20"):
        module(tokens(21))
    state = module.init_state(2)
    module(tokens(20), state=state)
    with pytest.raises(ValueError, match="hyena: 21 tokens"):
        module(tokens(1), state=state)
    for config in ({"order": 1}, {"max_length": 1}, {"bands": 0}):
        with pytest.raises(ValueError, match="hyena: order="):
            built(**config)
