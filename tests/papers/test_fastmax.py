"""Fastmax: the polynomial as loops, its factors, its two orders, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.linear.fastmax import Fastmax, standardise


def built(**config: object) -> Fastmax:
    torch.manual_seed(0)
    module = Fastmax(12, 3, **config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    return module


def tokens(n: int, seed: int = 5) -> Tensor:
    return torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normal(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(spread + 1e-6) for value in values]


def by_loops(module: Fastmax, x: Tensor, source: Tensor, *, causal: bool) -> Tensor:
    """Every pair's score as a sum over features, and the first terms of exp(score)."""
    q, k, v = x @ module.q_proj.weight.T, source @ module.k_proj.weight.T, source @ module.v_proj.weight.T
    d, out = module.head_dim, torch.zeros_like(x)
    for b in range(x.shape[0]):
        for h in range(module.heads):
            part = slice(h * d, (h + 1) * d)
            for i in range(x.shape[1]):
                mine, total = normal(q[b, i, part].tolist()), 0.0
                for j in range(i + 1 if causal else source.shape[1]):
                    score = module.scale * sum(
                        one * two for one, two in zip(mine, normal(k[b, j, part].tolist()), strict=True)
                    )
                    weight = sum(score**order / math.factorial(order) for order in range(module.p + 1))
                    out[b, i, part] += weight * v[b, j, part]
                    total += weight
                out[b, i, part] /= total
    return out @ module.o_proj.weight.T


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_the_polynomial_of_every_pair(p: int, causal: bool) -> None:
    module, x, other = built(p=p, causal=causal, chunk=3), tokens(7), tokens(5, 9)
    assert_close(module(x).output, by_loops(module, x, x, causal=causal))
    assert_close(module(x, other).output, by_loops(module, x, other, causal=False))


def test_scores_of_second_order_are_not_divided_and_those_of_first_order_by_the_features() -> None:
    assert [built(p=p).scale for p in (1, 2)] == [1 / 4, 1.0]


@torch.no_grad()
def test_standardised_tokens_forget_scale_and_offset() -> None:
    x = tokens(4)
    found = standardise(x)
    assert_close(found.mean(-1), torch.zeros(2, 4, dtype=torch.float64))
    assert_close(found.square().mean(-1), torch.ones(2, 4, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert_close(standardise(7.0 * x + 3.0), found, rtol=1e-4, atol=1e-4)
    assert standardise(1e30 * x.float()).isfinite().all()


@pytest.mark.parametrize("p", [1, 2])
@torch.no_grad()
def test_weights_are_a_distribution_and_say_what_is_mixed(p: int) -> None:
    module, x = built(p=p, causal=True), tokens(9)
    result = module(x, need_weights=True)
    assert (result.weights >= 0).all()
    assert_close(result.weights.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    v = module.v_proj(x).unflatten(-1, (3, 4)).transpose(1, 2)
    assert_close(module.o_proj((result.weights @ v).transpose(1, 2).flatten(-2)), result.output)


@torch.no_grad()
def test_a_small_scale_makes_both_orders_a_mean_of_values() -> None:
    x = tokens(6)
    for p in (1, 2):
        module = built(p=p, scale=1e-9)
        wanted = module.o_proj(module.v_proj(x).mean(1, keepdim=True)).expand(-1, 6, -1)
        assert_close(module(x).output, wanted, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_the_second_order_is_nearer_to_softmax_than_the_first() -> None:
    x = tokens(8)
    module = built(p=2, scale=0.1)
    q, k = (standardise(p(x).unflatten(-1, (3, 4)).transpose(1, 2)) for p in (module.q_proj, module.k_proj))
    softmax = (0.1 * q @ k.mT).softmax(-1)
    first, second = (built(p=p, scale=0.1)(x, need_weights=True).weights for p in (1, 2))
    assert (second - softmax).abs().max() < 0.5 * (first - softmax).abs().max()


def test_what_cannot_be_is_refused_by_name() -> None:
    for config in ({"p": 3}, {"p": 1, "scale": 0.3}, {"scale": 0.0}, {"scale": math.nan}):
        with pytest.raises(ValueError, match="fastmax: "):
            Fastmax(12, 3, **config)
    with pytest.raises(ValueError, match="one feature per head"):
        Fastmax(4, 4)
