"""H3: both state space models as recurrences over complex numbers, its matrix, and its multiplicative case."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.recurrent.h3 import H3


def built(heads: int = 3, **config: object) -> H3:
    torch.manual_seed(0)
    return H3(6, heads, **{"state_dim": 4, "taps": 3, **config}).double()


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def step_of(module: H3, h: int) -> list[tuple[complex, complex, complex]]:
    """(lambda, gain, C) of each mode of head h."""
    found = []
    for s in range(module.turn.shape[1]):
        a = complex(-math.exp(module.log_decay[h, s]), float(module.turn[h, s]))
        decay = cmath.exp(math.exp(module.log_step[h]) * a)
        found.append((decay, (decay - 1) / a, complex(*module.read[h, s].tolist())))
    return found


def by_recurrence(module: H3, x: Tensor) -> Tensor:
    """x_s <- lambda_s x_s + gain_s u, y = 2 Re sum C_s x_s + D u for every element of k (x) v, token by token."""
    q, k, v = (p(x).tolist() for p in (module.q_proj, module.k_proj, module.v_proj))
    d, out, shift = module.head_dim, torch.zeros_like(x), module.taps.tolist()
    for b in range(x.shape[0]):
        for h in range(module.heads):
            modes = step_of(module, h)
            for one in range(h * d, (h + 1) * d):
                for two in range(h * d, (h + 1) * d):
                    held = [0j] * len(modes)
                    for t in range(x.shape[1]):
                        key = sum(shift[one][lag] * k[b][t - lag][one] for lag in range(len(shift[one])) if lag <= t)
                        u = key * v[b][t][two]
                        held = [lam * s + gain * u for (lam, gain, _), s in zip(modes, held, strict=True)]
                        y = 2 * sum((c * s).real for (_, _, c), s in zip(modes, held, strict=True))
                        out[b, t, two] += q[b][t][one] * (y + float(module.skip[h]) * u)
    return module.o_proj(out)


@pytest.mark.parametrize("heads", [1, 3, 6])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@torch.no_grad()
def test_equals_the_two_state_space_models(heads: int, chunk: int) -> None:
    module, x = built(heads, chunk=chunk), tokens(9)
    assert_close(module(x).output, by_recurrence(module, x))


@torch.no_grad()
def test_the_matrix_is_what_is_mixed() -> None:
    module, x = built(chunk=4), tokens(9)
    result = module(x, need_weights=True)
    v = module.v_proj(x).unflatten(-1, (3, 2)).transpose(1, 2)
    assert_close(module.o_proj((result.weights @ v).transpose(1, 2).flatten(-2)), result.output)


@torch.no_grad()
def test_modes_start_as_those_of_s4d_and_steps_between_their_bounds() -> None:
    module = H3(64, 8)
    assert module.read.shape == (8, 32, 2)
    assert_close(module.turn[3], torch.pi * torch.arange(32))
    assert_close(module.log_decay.exp(), torch.full((8, 32), 0.5))
    step = module.log_step.exp()
    assert ((step >= 0.0009) & (step <= 0.11)).all()


@torch.no_grad()
def test_a_first_tap_alone_and_no_memory_multiply_token_by_token() -> None:
    module, x = built(6), tokens(5)
    module.taps.zero_()
    module.taps[:, 0] = 1.0
    module.read.zero_()
    module.skip.fill_(1.0)
    wanted = module.o_proj(module.q_proj(x) * module.k_proj(x) * module.v_proj(x))
    assert_close(module(x).output, wanted)


@torch.no_grad()
def test_a_shift_finds_what_followed_a_token() -> None:
    """The paper's use of the shift: with the second tap alone, a key is the token before the value."""
    module, x = built(3), tokens(6)
    module.taps.zero_()
    module.taps[:, 1] = 1.0
    module.k_proj.bias.zero_()
    weights = module(x, need_weights=True).weights
    other = x.clone()
    other[:, 2] = 9.0
    changed = (module(other, need_weights=True).weights - weights)[:, :, 4].abs().amax((0, 1))
    assert changed[3] > 1e-3
    assert_close(changed[[0, 1, 2, 4]], torch.zeros(4, dtype=torch.float64))


def test_what_cannot_be_is_refused() -> None:
    for config in ({"state_dim": 5}, {"state_dim": 0}, {"taps": 0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="h3: "):
            built(**config)
    with pytest.raises(ValueError, match="h3: a dense mask"):
        built()(tokens(3), mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))
