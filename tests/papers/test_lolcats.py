"""Hedgehog with a window (LoLCATs, arXiv:2410.10254): the equation as loops, its forms, and softmax at its limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.linear.hedgehog import Hedgehog, feature_map
from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.testing import LargestTensor, check_mechanism
from manyheads.testing.properties import PROPERTIES


def built(*, window: int = 3, seed: int = 0, **config: Any) -> Hedgehog:
    torch.manual_seed(seed)
    module = Hedgehog(16, 4, causal=True, window=window, **config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module.eval()


def tokens(n: int, *, batch: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(batch, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_loops(module: Hedgehog, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, e] of real tokens -> output [n, e] and weights [h, n, n], one query, one key at a time."""
    n, d, groups = len(x), module.head_dim, module.heads // module.kv_heads
    q, k, v = module.project(x[None], x[None])
    places = torch.arange(n)[None]
    q, k = module.position(q, k, places, places)
    mixed, weights = torch.zeros(n, module.heads, d, dtype=x.dtype), torch.zeros(module.heads, n, n, dtype=x.dtype)
    for h in range(module.heads):
        own, keys, values = q[0, h], k[0, h // groups], v[0, h // groups]
        phi_q = feature_map(own[None, None], module.q_map[h : h + 1])[0, 0]
        phi_k = feature_map(keys[None, None], module.k_map[h : h + 1])[0, 0]
        share = 1 / (1 + math.exp(-float(module.window_factor[h])))
        for i in range(n):
            first = max(i - module.window + 1, 0)
            scores = {j: float(own[i] @ keys[j]) / math.sqrt(d) for j in range(first, i + 1)}
            top = max(scores.values())
            row = {j: share * math.exp(score - top) for j, score in scores.items()}
            row |= {j: float(phi_q[i] @ phi_k[j]) for j in range(first)}
            total = sum(row.values())
            for j, weight in row.items():
                weights[h, i, j] = weight / total
                mixed[i, h] += weight / total * values[j]
    return module.o_proj(mixed.flatten(1)), weights


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("rotary", [None, {}])
@pytest.mark.parametrize(
    ("n", "window", "chunk"), [(11, 3, 4), (11, 1, 1), (9, 4, 64), (7, 7, 2), (5, 40, 3), (1, 2, 2)]
)
@torch.no_grad()
def test_equals_the_equation(n: int, window: int, chunk: int, rotary: Any, kv_heads: int) -> None:
    module, x = built(window=window, chunk=chunk, rotary=rotary, kv_heads=kv_heads), tokens(n)
    found, plain = module(x, need_weights=True), module(x).output
    for row in range(2):
        output, weights = by_loops(module, x[row])
        assert_close(found.output[row], output)
        assert_close(plain[row], output)
        assert_close(found.weights[row], weights)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_parallel_recurrent_and_quadratic_forms_agree_in_gradients_too(chunk: int) -> None:
    results = []
    for form in ("parallel", "quadratic", "recurrent", "parts"):
        module, row = built(chunk=chunk, rotary={}), tokens(16).requires_grad_()
        if form in ("recurrent", "parts"):
            state = module.init_state(2)
            output = torch.cat(
                [module(part, state=state).output for part in row.split(1 if form == "recurrent" else 5, 1)], 1
            )
        else:
            output = module(row, need_weights=form == "quadratic").output
        output.square().sum().backward()
        results.append([output.detach(), row.grad, *(p.grad for p in module.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_close(one, two, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_window_that_holds_everything_is_softmax() -> None:
    for window in (9, 200):
        module = built(window=window, rotary={}, kv_heads=2)
        plain = Softmax(16, 4, causal=True, rotary={}, kv_heads=2).double()
        plain.load_state_dict({k: v for k, v in module.state_dict().items() if k in plain.state_dict()})
        assert_close(module(tokens(9)).output, plain(tokens(9)).output)


@torch.no_grad()
def test_without_a_share_of_the_window_and_with_no_near_keys_it_is_linear_attention() -> None:
    module, linear = built(window=1), Hedgehog(16, 4, causal=True).double()
    linear.load_state_dict({k: v for k, v in module.state_dict().items() if k in linear.state_dict()})
    module.window_factor.fill_(-60.0)
    x = tokens(8)
    found = module(x, need_weights=True).weights
    # What is left out is each query's own key, of which the window of one token held e^-60.
    wanted = linear(x, need_weights=True).weights.tril(-1)
    assert_close(found[..., 1:, :], (wanted / wanted.sum(-1, keepdim=True))[..., 1:, :])


@torch.no_grad()
def test_padding_anywhere_is_as_if_it_were_not_there() -> None:
    module, x = built(window=3, chunk=4), tokens(14)
    mask = torch.tensor([[j not in (0, 1, 5, 9) for j in range(14)], [j % 3 != 1 and j < 12 for j in range(14)]])
    garbage = torch.where(mask[..., None], x, torch.nan)
    whole = module(garbage, mask=mask)
    matrix = module(x, mask=mask, need_weights=True)
    state = module.init_state(2)
    parts = [module(a, mask=b, state=state) for a, b in zip(garbage.split(4, 1), mask.split(4, 1), strict=True)]
    for row in range(2):
        wanted, weights = by_loops(module, x[row, mask[row]])
        assert_close(whole.output[row, mask[row]], wanted)
        assert_close(matrix.output[row, mask[row]], wanted)
        assert_close(matrix.weights[row][:, mask[row]][..., mask[row]], weights)
        assert_close(torch.cat([p.output for p in parts], 1)[row, mask[row]], wanted)


@torch.no_grad()
def test_the_state_stops_growing_and_a_long_pass_holds_no_matrix() -> None:
    module, sizes = built(window=8, chunk=16), []
    state = module.init_state(1)
    for n in (5, 30, 1, 60):
        module(tokens(n, batch=1), state=state)
        sizes.append(state.nbytes)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]
    with LargestTensor() as largest:
        module(tokens(400, batch=1))
    assert largest.size <= 400 * 16 * 2


@torch.no_grad()
def test_bfloat16_follows_float64() -> None:
    module, x = built(window=8, chunk=8).bfloat16(), tokens(200, batch=1).bfloat16()
    state = module.init_state(1)
    found = module(x, state=state).output
    assert state.fixed["memory"].dtype == torch.float32
    assert state.fixed["keys"].dtype == torch.bfloat16
    assert_close(found.double(), module.double()(x.double()).output, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("name", [prop.name for prop in PROPERTIES])
def test_conformance_with_a_window(name: str) -> None:
    check_mechanism(Hedgehog, config={"window": 3}, patterns=["causal-self"], properties=[name])


def test_refuses() -> None:
    with pytest.raises(ValueError, match="hedgehog: window=4 with causal=False"):
        Hedgehog(16, 4, window=4)
    with pytest.raises(ValueError, match="hedgehog: window=-1"):
        Hedgehog(16, 4, causal=True, window=-1)
    with pytest.raises(ValueError, match="give no context"):
        built()(tokens(3), tokens(4))
    state = built().init_state(2)
    built()(tokens(3), state=state)
    with pytest.raises(ValueError, match="need_weights=True was given with a state of 3 tokens"):
        built()(tokens(3), state=state, need_weights=True)
