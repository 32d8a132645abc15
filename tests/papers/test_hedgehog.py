"""Hedgehog: the equation as loops, and its three forms against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.linear.hedgehog import Hedgehog, feature_map
from manyheads.testing import check_mechanism


def built(*, dim: int = 12, heads: int = 3, seed: int = 0, **config: object) -> Hedgehog:
    torch.manual_seed(seed)
    module = Hedgehog(dim, heads, **config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def tokens(n: int, *, batch: int = 2, dim: int = 12, seed: int = 5) -> Tensor:
    return torch.randn(batch, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_phi(vector: list[float], weight: Tensor, features: str = "softmax") -> list[float]:
    d = len(vector)
    y = [sum(vector[r] * weight[r, c].item() for r in range(d)) for c in range(d)]
    if features == "exp":
        return [max(math.exp(e - max(y)), 1e-12) for e in y] + [max(math.exp(min(y) - e), 1e-12) for e in y]
    plus, minus = [math.exp(e) for e in y], [math.exp(-e) for e in y]
    return [max(e / sum(plus), 1e-12) for e in plus] + [max(e / sum(minus), 1e-12) for e in minus]


def turned(vector: list[float], position: int) -> list[float]:
    half, out = len(vector) // 2, list(vector)
    for p in range(half):
        angle = position * 10000.0 ** (-2 * p / len(vector))
        a, b = vector[p], vector[p + half]
        out[p], out[p + half] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
    return out


def loop_hedgehog(module: Hedgehog, x: Tensor, source: Tensor, *, causal: bool) -> Tensor:
    """One query, one head at a time."""
    d, out = module.head_dim, torch.zeros(*x.shape[:2], module.dim, dtype=x.dtype)
    q, k, v = x @ module.q_proj.weight.T, source @ module.k_proj.weight.T, source @ module.v_proj.weight.T
    for b in range(x.shape[0]):
        for h in range(module.heads):
            part = slice(h * d, (h + 1) * d)

            def place(row: Tensor, position: int) -> list[float]:
                return row.tolist() if module.rotary is None else turned(row.tolist(), position)

            kind = module.config["features"]
            keys = [loop_phi(place(k[b, j, part], j), module.k_map[h], kind) for j in range(source.shape[1])]
            for i in range(x.shape[1]):
                query = loop_phi(place(q[b, i, part], i), module.q_map[h], kind)
                seen = range(i + 1) if causal else range(source.shape[1])
                weights = {j: sum(a * c for a, c in zip(query, keys[j], strict=True)) for j in seen}
                for j, weight in weights.items():
                    out[b, i, part] += weight / sum(weights.values()) * v[b, j, part]
    return out @ module.o_proj.weight.T


@pytest.mark.parametrize("features", ["softmax", "exp"])
@pytest.mark.parametrize("rotary", [None, {}])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_equals_the_equation(causal: bool, cross: bool, rotary: dict | None, features: str) -> None:
    module = built(causal=causal, rotary=rotary, features=features, chunk=3)
    x, context = tokens(7), tokens(5, seed=6)
    with torch.no_grad():
        found = module(x, context if cross else None).output
        wanted = loop_hedgehog(module, x, context if cross else x, causal=causal and not cross)
    assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 64])
def test_chunked_recurrent_and_quadratic_forms_agree(chunk: int) -> None:
    x, results = tokens(16), []
    for form in ("chunked", "quadratic", "recurrent"):
        module = built(causal=True, chunk=chunk, rotary={"base": 100.0})
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


def test_long_sequences_without_their_matrix_equal_the_matrix() -> None:
    for causal in (False, True):
        module, x = built(causal=causal), tokens(300, batch=1)
        with torch.no_grad():
            assert_close(module(x).output, module(x, need_weights=True).output, rtol=1e-10, atol=1e-10)


def test_weights_are_a_distribution_and_mix_the_values() -> None:
    module, x = built(causal=True), tokens(9)
    with torch.no_grad():
        result = module(x, need_weights=True)
        values = (x @ module.v_proj.weight.T).unflatten(-1, (3, 4)).transpose(1, 2)
        mixed = (result.weights @ values).transpose(1, 2).flatten(-2) @ module.o_proj.weight.T
    assert_close(result.weights.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    assert (result.weights.tril() > 0).sum() == 2 * 3 * 45
    assert_close(result.output, mixed)


def test_maps_start_as_identities_and_are_apart_for_queries_and_keys() -> None:
    module = Hedgehog(12, 3)
    for weight in (module.q_map, module.k_map):
        assert_close(weight.detach(), torch.eye(4).expand(3, 4, 4))
    x = torch.randn(1, 3, 5, 4)
    found = feature_map(x, module.q_map)
    assert_close(found, torch.cat((x.softmax(-1), (-x).softmax(-1)), -1))
    assert_close(feature_map(-x, module.q_map), found.roll(4, -1))
    y = tokens(6).float()
    before = module(y).output
    with torch.no_grad():
        module.k_map.mul_(3.0)
    assert (module(y).output - before).abs().max() > 1e-4


def test_keys_have_no_order_without_causality() -> None:
    module, x, context = built(), tokens(4), tokens(9, seed=2)
    assert_close(module(x, context).output, module(x, context.flip(1)).output)


def test_tokens_that_are_not_there_leave_no_trace_in_the_state() -> None:
    module, x = built(causal=True, chunk=2), tokens(8)
    mask = torch.tensor([True, False, True, False, False, True, True, True]).expand(2, -1)
    garbage = torch.where(mask[..., None], x, torch.nan)
    with torch.no_grad():
        wanted = module(x[:, mask[0]]).output
        state = module.init_state(2)
        parts = [module(garbage[:, :5], mask=mask[:, :5], state=state), module(garbage[:, 5:], state=state)]
    assert_close(torch.cat([p.output for p in parts], 1)[:, mask[0]], wanted)


def test_a_context_is_read_once_and_its_length_is_held_to() -> None:
    module, x, context = built(causal=True), tokens(4), tokens(9, seed=2)
    state = module.init_state(2)
    with torch.no_grad():
        first = module(x[:, :2], context, state=state).output
        held = state.nbytes
        rest = module(x[:, 2:], torch.full_like(context, torch.nan), state=state).output
        assert_close(torch.cat([first, rest], 1), module(x, context).output)
    assert state.nbytes == held
    with pytest.raises(ValueError, match="hedgehog: the state was made for a context of 9 tokens, this one has 8"):
        module(x, context[:, :8], state=state)


def test_what_a_summary_cannot_give_is_refused() -> None:
    module, x = built(causal=True), tokens(4)
    state = module.init_state(2)
    module(x, state=state)
    with pytest.raises(ValueError, match=r"hedgehog: need_weights=True was given with a state of 4 tokens"):
        module(x, state=state, need_weights=True)
    with pytest.raises(ValueError, match=r"hedgehog: a dense mask of shape \(2, 1, 4, 8\)"):
        module(x, state=state, mask=torch.ones(2, 1, 4, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="hedgehog: chunk=0 must be at least 1"):
        Hedgehog(12, 3, chunk=0)


def test_the_floor_under_the_features_leaves_no_query_without_a_key() -> None:
    module = Hedgehog(16, 2, causal=True).float()
    with torch.no_grad():
        weights = module(1e4 * tokens(20)[..., :1].float().repeat(1, 1, 16), need_weights=True).weights
        sharp = torch.tensor([[[[100.0, 0, 0, 0, 0, 0, 0, 0]]]]) - 50
        features = feature_map(sharp, module.q_map[:1])
    assert_close(weights.sum(-1), torch.ones(2, 2, 20))
    assert features.min() == torch.tensor(1e-12)


def test_bfloat16_sums_in_float32_and_large_inputs_stay_finite() -> None:
    module = Hedgehog(16, 2, causal=True, chunk=8).bfloat16()
    x = torch.randn(1, 700, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    state = module.init_state(1)
    with torch.no_grad():
        found = module(x, state=state).output
        wanted = module.double()(x.double()).output
        assert_close(found.double(), wanted, rtol=0.05, atol=0.02)
        assert state.fixed["memory"].dtype == torch.float32
        assert module.float()(1e4 * x.float()).output.isfinite().all()


def test_conformance_of_the_exp_map() -> None:
    check_mechanism(Hedgehog, config={"features": "exp"}, patterns=["noncausal-self", "causal-self"], largest=9)


def test_another_map_is_refused() -> None:
    with pytest.raises(ValueError, match="hedgehog: features='relu'"):
        Hedgehog(12, 3, features="relu")
