"""Based: the Taylor kernel as loops, and its three forms against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.functional.linear import taylor_features, taylor_value
from manyheads.mechanisms.linear.based import Based


def built(*, seed: int = 0, **config: object) -> Based:
    torch.manual_seed(seed)
    module = Based(12, 3, **{"feature_dim": 5, **config}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    return module


def tokens(n: int, *, batch: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(batch, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_based(module: Based, x: Tensor) -> Tensor:
    """One query, one head at a time, with no features: the kernel on scaled dot products."""
    f, d, out = module.feature_dim, module.head_dim, torch.zeros_like(x)
    q, k, v = x @ module.q_proj.weight.T, x @ module.k_proj.weight.T, x @ module.v_proj.weight.T
    for b in range(x.shape[0]):
        for h in range(module.heads):
            part, wide = slice(h * f, (h + 1) * f), slice(h * d, (h + 1) * d)
            for i in range(x.shape[1]):
                weights = []
                for j in range(i + 1 if module.causal else x.shape[1]):
                    s = sum(a * c for a, c in zip(q[b, i, part].tolist(), k[b, j, part].tolist(), strict=True))
                    s /= math.sqrt(f)
                    weights.append(1 + s + s * s / 2)
                for j, weight in enumerate(weights):
                    out[b, i, wide] += weight / sum(weights) * v[b, j, wide]
    return out @ module.o_proj.weight.T


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_equation(causal: bool) -> None:
    module, x = built(causal=causal, chunk=3), tokens(7)
    with torch.no_grad():
        assert_close(module(x).output, loop_based(module, x), rtol=1e-10, atol=1e-10)


def test_features_are_one_and_the_products_of_first_and_second_order() -> None:
    a, b = (torch.randn(6, 16, dtype=torch.float64) for _ in range(2))
    assert taylor_features(a).shape == (6, 1 + 16 + 256)
    s = (a * b).sum(-1)
    assert_close((taylor_features(a) * taylor_features(b)).sum(-1), 1 + s + s**2 / 2)
    assert_close(taylor_value(s), 1 + s + s**2 / 2)
    assert taylor_value(torch.linspace(-3, 1, 41, dtype=torch.float64)).min() == 0.5


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 64])
def test_chunked_recurrent_and_quadratic_forms_agree(chunk: int) -> None:
    x, results = tokens(16), []
    for form in ("chunked", "quadratic", "recurrent"):
        module = built(causal=True, chunk=chunk)
        row = x.clone().requires_grad_()
        if form == "recurrent":
            state = module.init_state(2)
            output = torch.cat([module(row[:, t : t + 1], state=state).output for t in range(16)], 1)
        else:
            output = module(row, need_weights=form == "quadratic").output
        output.square().sum().backward()
        results.append([output.detach(), row.grad, *(p.grad for p in module.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_near_zero_it_is_softmax_attention_to_third_order() -> None:
    module, x = built(causal=True), tokens(9)
    gaps = []
    for size in (0.1, 0.05):
        with torch.no_grad():
            found = module(size * x, need_weights=True).weights
            q, k = (p(size * x).unflatten(-1, (3, 5)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
            scores = (q @ k.mT / 5**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        gaps.append((found - scores.softmax(-1)).abs().max().item())
    # Scores shrink by 4 when x is halved, and a third-order error by 4^3.
    assert 0 < gaps[1] < gaps[0] / 50 < 1e-4


def test_the_state_is_a_fixed_number_of_sums() -> None:
    module, x = built(causal=True), tokens(40)
    state, sizes = module.init_state(2), []
    with torch.no_grad():
        for part in x.split(10, 1):
            module(part, state=state)
            sizes.append(state.nbytes)
    assert sizes == [2 * 3 * (1 + 5 + 25) * (4 + 1) * 8] * 4
    k = module.k_proj(x).unflatten(-1, (3, 5)) / 5**0.25
    assert_close(state.fixed["memory"][..., 0, -1], torch.full((2, 3), 40.0, dtype=torch.float64))
    assert_close(state.fixed["memory"][..., 1:6, -1], k.sum(1))


def test_tokens_that_are_not_there_leave_no_trace_in_the_state() -> None:
    module, x = built(causal=True, chunk=2), tokens(8)
    mask = torch.tensor([True, False, True, False, False, True, True, True]).expand(2, -1)
    garbage = torch.where(mask[..., None], x, torch.nan)
    with torch.no_grad():
        wanted = module(x[:, mask[0]]).output
        state = module.init_state(2)
        parts = [module(garbage[:, :5], mask=mask[:, :5], state=state), module(garbage[:, 5:], state=state)]
    assert_close(torch.cat([p.output for p in parts], 1)[:, mask[0]], wanted)


def test_what_a_summary_cannot_give_is_refused() -> None:
    module, x = built(causal=True), tokens(4)
    state = module.init_state(2)
    module(x, state=state)
    with pytest.raises(ValueError, match="based: need_weights=True was given with a state of 4 tokens"):
        module(x, state=state, need_weights=True)
    with pytest.raises(ValueError, match="based: feature_dim=0 must be at least 1"):
        Based(12, 3, feature_dim=0)


def test_bfloat16_sums_in_float32_and_large_inputs_stay_finite() -> None:
    torch.manual_seed(0)
    module = Based(16, 2, causal=True, chunk=8).bfloat16()
    x = torch.randn(1, 700, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    state = module.init_state(1)
    with torch.no_grad():
        found = module(x, state=state).output
        wanted = module.double()(x.double()).output
        assert_close(found.double(), wanted, rtol=0.05, atol=0.02)
        assert state.fixed["memory"].dtype == torch.float32
        assert module.float()(1e4 * x.float()).output.isfinite().all()
        for causal in (False, True):
            assert Based(16, 2, causal=causal, chunk=1)(1e4 * x.float()).output.isfinite().all()
