"""TransNormerLLM: LRPE-d as loops over pairs and features, and what it becomes without rotation or decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.linear.lightning import Lightning
from manyheads.mechanisms.linear.transnormerllm import TransNormerLLM


def built(**config: object) -> TransNormerLLM:
    torch.manual_seed(0)
    return TransNormerLLM(12, 4, **config).double()


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def by_loops(module: TransNormerLLM, x: Tensor, slopes: list[float], places: list[int]) -> Tensor:
    d, out = module.head_dim, torch.zeros_like(x)
    q, k = (t / (1 + (-t).exp()) for t in (x @ module.q_proj.weight.T, x @ module.k_proj.weight.T))
    v, u = x @ module.v_proj.weight.T, x @ module.u_proj.weight.T
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            for h, slope in enumerate(slopes):
                part = slice(h * d, (h + 1) * d)
                for j in range(i + 1):
                    score = 0.0
                    for f in range(d):
                        theta = 0.0 if module.theta is None else float(module.theta[h, f])
                        turned = math.cos(theta * (places[i] - places[j]))
                        score += float(q[b, i, h * d + f] * k[b, j, h * d + f]) * turned
                    out[b, i, part] += math.exp(-slope * (i - j)) * score * v[b, j, part]
            root = math.sqrt(sum(e * e for e in out[b, i].tolist()) / module.dim + 1e-6)
            out[b, i] *= u[b, i] / root
    return out @ module.o_proj.weight.T


@pytest.mark.parametrize(("layer", "share"), [(0, 1.0), (1, 0.5), (2, 0.0)])
@torch.no_grad()
def test_equals_the_equation(layer: int, share: float) -> None:
    module, x = built(layer=layer, layers=3, lrpe=True, chunk=3), tokens(8)
    slopes = [share * 2.0 ** -(2 * h) for h in range(1, 5)]
    assert_close(module(x).output, by_loops(module, x, slopes, list(range(8))), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_rotation_is_in_positions_and_relative() -> None:
    module, x = built(chunk=2), tokens(6)
    slopes, places = [2.0 ** -(2 * h) for h in range(1, 5)], [3, 4, 9, 10, 11, 40]
    found = module(x, positions=torch.tensor(places)).output
    assert_close(found, by_loops(module, x, slopes, places), rtol=1e-9, atol=1e-9)
    assert_close(module(x, positions=torch.tensor(places) + 1000).output, found, rtol=1e-7, atol=1e-7)
    assert (module(x).output - found).abs().max() > 1e-3


@torch.no_grad()
def test_only_the_first_layer_rotates_unless_told_and_others_are_lightning() -> None:
    assert built(layer=0, layers=4).theta is not None
    module = built(layer=1, layers=4)
    assert module.theta is None
    plain = Lightning(12, 4, decay_scale=2 / 3).double()
    plain.load_state_dict(module.state_dict())
    x = tokens(9)
    assert_close(module(x).output, plain(x).output)
    still = built(layer=1, layers=4, lrpe=True)
    still.theta.zero_()
    still.load_state_dict({**module.state_dict(), "theta": still.theta})
    assert_close(still(x).output, plain(x).output)


def test_theta_starts_as_ten_thousand_to_a_share_of_all_features() -> None:
    theta = built().theta
    assert_close(theta.flatten()[[0, 3, 11]].tolist(), [1.0, 10000 ** (-0.5), 10000 ** (-22 / 12)], rtol=1e-6, atol=0)


@torch.no_grad()
def test_weights_are_what_is_mixed_before_the_norm() -> None:
    module, x = built(), tokens(7)
    result = module(x, need_weights=True)
    v = module.v_proj(x).unflatten(-1, (4, 3)).transpose(1, 2)
    mixed = (result.weights @ v).transpose(1, 2).flatten(-2)
    normed = torch.nn.functional.rms_norm(mixed, (12,), eps=1e-6)
    assert_close(module.o_proj(module.u_proj(x) * normed), result.output)


def test_a_layer_that_is_not_there_is_refused() -> None:
    for layer, layers in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"transnormerllm: layer={layer} of layers={layers}"):
            TransNormerLLM(12, 4, layer=layer, layers=layers)
