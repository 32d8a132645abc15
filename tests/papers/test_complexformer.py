"""ComplexFormer: the score pair by pair in polar form, and rotary embedding as its special case."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.position.complexformer import ComplexFormer

close = torch.testing.assert_close


def loops(module: ComplexFormer, x: Tensor, causal: bool, positions: list[int]) -> Tensor:
    n, d = len(x), module.head_dim
    half = d // 2
    q, k, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    mixed = torch.zeros_like(q)
    for h in range(module.heads):
        at = h * d
        for i in range(n):
            seen, powers = range(i + 1 if causal else n), []
            for j in seen:
                score = 0.0
                for p in range(half):
                    one = complex(float(q[i, at + p]), float(q[i, at + half + p]))
                    two = complex(float(k[j, at + p]), float(k[j, at + half + p]))
                    angle = float(module.delta[h, p]) * (cmath.phase(one) - cmath.phase(two))
                    angle += float(module.angle_bias[h, p])
                    angle += (positions[i] - positions[j]) * module.base ** (-2 * p / d)
                    sizes = math.sqrt(abs(one) ** 2 + 1e-9) * math.sqrt(abs(two) ** 2 + 1e-9)
                    score += sizes * math.cos(angle)
                powers.append(math.exp(score))
            for j, power in zip(seen, powers, strict=True):
                mixed[i, at : at + d] += power / sum(powers) * v[j, at : at + d]
    return mixed @ module.o_proj.weight.T


def _module(causal: bool) -> ComplexFormer:
    torch.manual_seed(0)
    module = ComplexFormer(16, 4, causal=causal, base=50.0).double()
    with torch.no_grad():
        module.angle_bias.copy_(torch.randn(4, 2))
    return module


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool) -> None:
    module, x, positions = _module(causal), torch.randn(1, 6, 16, dtype=torch.float64), [3, 4, 5, 9, 10, 20]
    output = module(x, positions=torch.tensor(positions)).output[0]
    close(output, loops(module, x[0], causal, positions), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_is_rotary_where_delta_is_one(causal: bool) -> None:
    module = _module(causal)
    module.delta.fill_(1.0)
    module.angle_bias.zero_()
    plain = Softmax(16, 4, causal=causal, rotary={"base": 50.0}).double()
    plain.load_state_dict({n: w for n, w in module.state_dict().items() if "proj" in n})
    plain.q_proj.weight.mul_(2.0)  # plain attention divides by sqrt(4)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    close(module(x).output, plain(x).output, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_shifting_positions_changes_nothing() -> None:
    module, x = _module(True), torch.randn(2, 6, 16, dtype=torch.float64)
    close(module(x, positions=torch.arange(40, 46)).output, module(x).output, rtol=1e-9, atol=1e-9)


def test_tokens_of_zeros_have_gradients() -> None:
    module, x = _module(True), torch.zeros(1, 3, 16, dtype=torch.float64, requires_grad=True)
    module(x).output.square().sum().backward()
    grads = [x.grad, *(p.grad for p in module.parameters())]
    assert all(bool(g.isfinite().all()) for g in grads if g is not None)


def test_odd_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="3 features per head"):
        ComplexFormer(12, 4)
