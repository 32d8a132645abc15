"""Adaptively sparse attention: alpha-entmax against its definition and the `entmax` package, and the equation."""

import math

import entmax as package
import pytest
import torch
from torch import Tensor

from manyheads.functional.entmax import entmax
from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.scoring.entmax import Entmax

close = torch.testing.assert_close
BETAS = [0.02, 0.3, 0.5, 0.77, 1.0]


def by_definition(scores: list[float], alpha: float) -> list[float]:
    """[(alpha - 1) z - tau]_+^(1 / (alpha - 1)), with tau found by halving an interval 200 times."""
    scaled = [(alpha - 1) * s for s in scores]

    def weights(tau: float) -> list[float]:
        return [max(s - tau, 0.0) ** (1 / (alpha - 1)) for s in scaled]

    low, high = max(scaled) - 1, max(scaled)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weights(middle)) >= 1 else (low, middle)
    return weights(low)


def _beta(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_equals_its_definition(beta: float) -> None:
    torch.manual_seed(0)
    for size, spread in ((1, 1.0), (2, 0.1), (5, 3.0), (30, 1.0), (30, 20.0)):
        scores = spread * torch.randn(size, dtype=torch.float64)
        wanted = torch.tensor(by_definition(scores.tolist(), 1 + beta), dtype=torch.float64)
        close(entmax(scores, _beta(beta)), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta", BETAS)
def test_hard_cases_converge(beta: float) -> None:
    """Scores that enter the support one after the other, and scores all at its edge."""
    edge = 1 / max(beta, 0.05)
    for scores in (
        -1.2 * 2.0 ** torch.linspace(-12, 0, 300),
        -edge * torch.linspace(0, 1, 300),
        -edge * torch.ones(99),
    ):
        scores = torch.cat([scores.double(), torch.zeros(1, dtype=torch.float64)])
        wanted = torch.tensor(by_definition(scores.tolist(), 1 + beta), dtype=torch.float64)
        close(entmax(scores, _beta(beta)), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.5, 0.9])
def test_equals_the_package_gradients_too(beta: float) -> None:
    torch.manual_seed(1)
    scores, weigh = 2 * torch.randn(3, 4, 11, dtype=torch.float64), torch.randn(3, 4, 11, dtype=torch.float64)
    results = []
    for ours in (True, False):
        z = scores.clone().requires_grad_()
        b = torch.tensor([beta, beta / 2, 0.6, 1 - beta / 2], dtype=torch.float64)[:, None].requires_grad_()
        p = entmax(z, b) if ours else package.entmax_bisect(z, 1 + b, dim=-1, n_iter=80)
        results.append((p, *torch.autograd.grad((p * weigh).sum(), (z, b))))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted, rtol=1e-7, atol=1e-8)


def test_equals_the_exact_forms() -> None:
    torch.manual_seed(2)
    z, weigh = 3 * torch.randn(4, 17, dtype=torch.float64, requires_grad=True), torch.randn(4, 17, dtype=torch.float64)
    for beta, exact in ((0.5, package.entmax15), (1.0, package.sparsemax)):
        got, wanted = entmax(z, _beta(beta)), exact(z, dim=-1)
        close(got, wanted, rtol=1e-11, atol=1e-12)
        grads = [torch.autograd.grad((p * weigh).sum(), z, retain_graph=True)[0] for p in (got, wanted)]
        close(grads[0], grads[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("beta", [1e-3, 0.04, 0.5, 0.93])
def test_gradcheck(beta: float) -> None:
    torch.manual_seed(3)
    z = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    b = torch.tensor([beta, beta / 2, beta / 3], dtype=torch.float64)[:, None].requires_grad_()
    allowed = torch.rand(2, 1, 6) < 0.7
    allowed[0] = False
    assert torch.autograd.gradcheck(lambda z, b: entmax(z, b, allowed), (z, b), eps=1e-7, atol=1e-5)


def test_the_limit_is_softmax() -> None:
    """Values, the gradient of the scores, and that of alpha: p (E log^2 p - log^2 p) / 2 as alpha goes to one."""
    torch.manual_seed(4)
    z, weigh = torch.randn(5, 9, dtype=torch.float64, requires_grad=True), torch.randn(5, 9, dtype=torch.float64)
    b = torch.tensor([1e-13], dtype=torch.float64, requires_grad=True)
    p, soft = entmax(z, b), z.softmax(-1)
    close(p, soft, rtol=1e-10, atol=1e-12)
    by_z, by_b = torch.autograd.grad((p * weigh).sum(), (z, b))
    close(by_z, torch.autograd.grad((soft * weigh).sum(), z)[0], rtol=1e-10, atol=1e-12)
    square = z.detach().log_softmax(-1) ** 2
    slope = soft.detach() * ((soft.detach() * square).sum(-1, keepdim=True) - square) / 2
    close(by_b, (slope * weigh).sum()[None], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("beta", [1e-6, 0.3, 1.0])
def test_extreme_scores(beta: float, dtype: torch.dtype) -> None:
    scores = torch.tensor([[1e8, -1e8, 3.0], [1e30, 1e30, 0.0], [-1e30, -1e30, -1e30]], dtype=dtype, requires_grad=True)
    b = torch.tensor([beta], requires_grad=True)
    p = entmax(scores, b)
    p.square().sum().backward()
    close(p, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3], dtype=dtype))
    assert p.dtype == dtype
    assert bool(scores.grad.isfinite().all())
    assert bool(b.grad.isfinite().all())


def test_rows_with_nothing_allowed_are_zero() -> None:
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    p = entmax(torch.tensor([[0.0, 50.0, 0.0], [1.0, 2.0, 3.0]]), torch.tensor([0.4]), allowed)
    close(p, torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]))


def loops(module: Entmax, x: Tensor, causal: bool) -> Tensor:
    d = module.head_dim
    q, k, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    mixed = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for head in range(module.heads):
            part, alpha = slice(head * d, (head + 1) * d), 1 + 1 / (1 + math.exp(-float(module.alpha_logit[head])))
            for i in range(x.shape[1]):
                seen = range(i + 1 if causal else x.shape[1])
                scores = [float(q[b, i, part] @ k[b, j, part]) / math.sqrt(d) for j in seen]
                for j, weight in zip(seen, by_definition(scores, alpha), strict=True):
                    mixed[b, i, part] += weight * v[b, j, part]
    return mixed @ module.o_proj.weight.T


def _module(causal: bool = False) -> Entmax:
    torch.manual_seed(5)
    module = Entmax(12, 3, causal=causal).double()
    with torch.no_grad():
        module.alpha_logit.copy_(torch.tensor([-2.0, 0.0, 3.0]))
        module.q_proj.weight.mul_(6.0)
    return module


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool) -> None:
    module, x = _module(causal), torch.randn(2, 6, 12, dtype=torch.float64)
    result = module(x, need_weights=True)
    close(result.output, loops(module, x, causal), rtol=1e-10, atol=1e-10)
    past = torch.ones(6, 6, dtype=torch.bool).tril() if causal else torch.ones(6, 6, dtype=torch.bool)
    zeros = (result.weights == 0)[:, :, past].double().mean((0, 2))
    assert zeros[2] > 0.2, "a head with alpha near two must leave keys out"
    assert zeros[0] < zeros[2]


@torch.no_grad()
def test_between_softmax_and_sparsemax() -> None:
    module, plain, x = _module(), Softmax(12, 3).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    plain.load_state_dict({n: w for n, w in module.state_dict().items() if n != "alpha_logit"})
    module.alpha_logit.fill_(-40.0)
    close(module(x).output, plain(x).output, rtol=1e-10, atol=1e-10)
    module.alpha_logit.fill_(40.0)
    q, k = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    wanted = package.sparsemax(q @ k.transpose(-1, -2) / 2, dim=-1)
    close(module(x, need_weights=True).weights, wanted, rtol=1e-10, atol=1e-10)
