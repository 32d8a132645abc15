"""Linear log-normal attention: moments and kernel as loops, the block-diagonal half, and what causality changes."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.linear.lln import LLN
from manyheads.testing import check_mechanism

A, B = 0.14855178144710912, -0.35487039130661086


def built(**config: object) -> LLN:
    torch.manual_seed(0)
    module = LLN(12, 3, **config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    return module


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def matched(q: Tensor, k: Tensor) -> tuple[float, float]:
    """alpha and beta of the tokens q, k [n, e] of one row."""
    q_std, k_std = (statistics.stdev(t.flatten().tolist()) for t in (q, k))
    wanted = math.sqrt((q_std**2 * k_std**2 - B) / (2 * A))
    return wanted / q_std, wanted / k_std


def factors(module: LLN, h: int) -> tuple[Tensor, Tensor]:
    """Of the linear and of the near half, per feature of a head."""
    if module.mixing == "average":
        return torch.full((2, 1), 0.5, dtype=torch.float64).unbind()
    r = module.r[0, h, 0]
    return r, module.p[0, h, 0] if module.mixing == "scale" else 1 - r


def by_loops(module: LLN, x: Tensor, *, causal: bool) -> Tensor:
    q, k, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    n, d, out = x.shape[1], module.head_dim, torch.zeros_like(x)
    for b in range(x.shape[0]):
        scales = [matched(q[b, : i + 1 if causal else n], k[b, : i + 1 if causal else n]) for i in range(n)]
        for h in range(module.heads):
            part = slice(h * d, (h + 1) * d)
            for i in range(n):
                keys = range(i + 1 if causal else n)
                query = [math.exp(scales[i][0] * e) for e in q[b, i, part].tolist()]
                linear = [
                    sum(a * math.exp(scales[j][1] * e) for a, e in zip(query, k[b, j, part].tolist(), strict=True))
                    for j in keys
                ]
                near = [
                    math.exp(float(q[b, i, part] @ k[b, j, part]) / math.sqrt(d))
                    if j // module.block == i // module.block
                    else 0.0
                    for j in keys
                ]
                for j in keys:
                    weight = torch.full((d,), linear[j] / sum(linear), dtype=x.dtype)
                    if module.diagonal:
                        one, other = factors(module, h)
                        weight = one * weight + other * near[j] / sum(near)
                    out[b, i, part] += weight * v[b, j, part]
    return out @ module.o_proj.weight.T


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "config",
    [{"diagonal": False}, {"block": 3}, {"block": 1}, {}, {"mixing": "scale"}, {"mixing": "ratio", "block": 3}],
)
@torch.no_grad()
def test_equals_the_equation(causal: bool, config: dict[str, object]) -> None:
    module, x = built(causal=causal, chunk=4, **config), tokens(10)
    for name in {"r", "p"} & set(dict(module.named_parameters())):
        getattr(module, name).copy_(torch.randn(1, 3, 1, 4))
    assert_close(module(x).output, by_loops(module, x, causal=causal), rtol=1e-9, atol=1e-9)
    assert module.block == config.get("block", 4)


@torch.no_grad()
def test_the_logarithm_of_weights_spreads_as_that_of_softmax_scores() -> None:
    """The fit's own claim: with std_q std_k = s, the scaled similarity has a log whose variance is about s^2."""
    generator = torch.Generator().manual_seed(1)
    for q_std, k_std in ((1.0, 1.0), (1.4, 1.0)):
        q, k = (std * torch.randn(600, 64, dtype=torch.float64, generator=generator) for std in (q_std, k_std))
        alpha, beta = matched(q, k)
        found = ((alpha * q).exp() @ (beta * k).exp().T).log()
        assert abs(float(found.var()) / (q_std * k_std) ** 2 - 1) < 0.25


@torch.no_grad()
def test_rows_of_a_batch_and_the_future_set_no_scale() -> None:
    x = tokens(9)
    loud = x.clone()
    loud[1] *= 50.0
    whole, past = built(diagonal=False), built(diagonal=False, causal=True)
    assert_close(whole(loud).output[0], whole(x).output[0])
    loud = x.clone()
    loud[:, 6:] *= 50.0
    assert_close(past(loud).output[:, :6], past(x).output[:, :6])
    assert (whole(loud).output[:, :6] - whole(x).output[:, :6]).abs().max() > 1e-2


def test_no_gradient_passes_through_the_moments() -> None:
    module, x = built(diagonal=False), tokens(5)
    q, k = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    scaled, _ = module._matched(q, k, _call())
    alpha = (scaled / q).detach()
    (grad,) = torch.autograd.grad(scaled.sum(), q)
    assert_close(grad, alpha)


def _call() -> object:
    from manyheads.card import Pattern
    from manyheads.mechanism import Call

    return Call(Pattern.NONCAUSAL_SELF)


@torch.no_grad()
def test_tokens_that_are_not_there_enter_no_moment_and_no_block() -> None:
    x = tokens(8)
    mask = torch.tensor([False, False, True, True, True, True, True, False]).expand(2, -1)
    garbage = torch.where(mask[..., None], x, 1e3)
    places = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5])
    for causal in (False, True):
        module = built(causal=causal, block=3)
        found = module(garbage, mask=mask, positions=places).output
        assert_close(found[:, mask[0]], module(x[:, mask[0]]).output)


@torch.no_grad()
def test_learned_mixing_starts_as_the_average_and_has_no_matrix() -> None:
    average, x = LLN(12, 3, causal=True).double(), tokens(9)
    for mixing in ("scale", "ratio"):
        module = LLN(12, 3, causal=True, mixing=mixing).double()
        module.load_state_dict(average.state_dict(), strict=False)
        assert_close(module(x).output, average(x).output)
        assert module(x, need_weights=True).weights is None


@pytest.mark.parametrize("mixing", ["scale", "ratio"])
def test_conformance_of_learned_mixing(mixing: str) -> None:
    check_mechanism(LLN, config={"mixing": mixing}, largest=9)


@pytest.mark.parametrize("config", [{"mixing": "sum"}, {"mixing": "scale", "diagonal": False}])
def test_mixing_of_nothing_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="lln: mixing="):
        LLN(12, 3, **config)


def test_a_block_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="lln: block=0"):
        LLN(12, 3, block=0)
