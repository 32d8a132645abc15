"""Multi-prompt Sinkhorn attention (arXiv:2403.14183) against the iteration on plain numbers, and its marginals."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.sinkhorn import transport_plan
from manyheads.mechanisms.scoring.sinkhorn import Sinkhorn


def plan(scores: Tensor, iterations: int) -> Tensor:
    """Columns and rows of exp(scores) rescaled in turn."""
    n, m = scores.shape
    cells = [[math.exp(float(scores[i, j])) for j in range(m)] for i in range(n)]
    for _ in range(iterations):
        for j in range(m):
            total = sum(cells[i][j] for i in range(n))
            for i in range(n):
                cells[i][j] *= n / m / total
        cells = [[cell / sum(row) for cell in row] for row in cells]
    return torch.tensor(cells, dtype=torch.float64)


def by_loops(module: Sinkhorn, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    parts, plans = [], []
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        q, k, v = (
            x @ module.q_proj.weight[own].T,
            source @ module.k_proj.weight[own].T,
            source @ module.v_proj.weight[own].T,
        )
        cosine = torch.tensor([[float(a @ b / a.norm() / b.norm()) for b in k] for a in q])
        plans.append(plan(cosine.double() / module.epsilon, module.iterations))
        parts.append(plans[-1] @ v)
    return torch.cat(parts, 1) @ module.o_proj.weight.T, torch.stack(plans)


@pytest.mark.parametrize("m", [None, 7])
@torch.no_grad()
def test_equals_loops(m: int | None) -> None:
    module = Sinkhorn(12, 3, epsilon=0.3, iterations=4).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    context = None if m is None else torch.randn(2, m, 12, dtype=torch.float64)
    result = module(x, context, need_weights=True)
    for row in range(2):
        output, plans = by_loops(module, x[row], x[row] if context is None else context[row])
        torch.testing.assert_close(result.output[row], output, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.weights[row], plans, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_padded_queries_take_nothing() -> None:
    module, x = Sinkhorn(12, 3, epsilon=0.3, iterations=4).double(), torch.randn(1, 6, 12, dtype=torch.float64)
    result = module(x, mask=torch.arange(6)[None] < 4, need_weights=True)
    output, plans = by_loops(module, x[0, :4], x[0, :4])
    torch.testing.assert_close(result.output[0, :4], output, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.weights[0, :, :4, :4], plans, rtol=1e-6, atol=1e-6)
    assert (result.weights[0, :, 4:] == 0).all()


@torch.no_grad()
def test_converged_plans_have_both_sums() -> None:
    module = Sinkhorn(12, 3, epsilon=0.5, iterations=200).double()
    x, context = torch.randn(1, 4, 12, dtype=torch.float64), torch.randn(1, 6, 12, dtype=torch.float64)
    mask = torch.tensor([[True] * 5 + [False]])
    weights = module(x, context, mask=mask, need_weights=True).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3, 4, dtype=torch.float64))
    wanted = torch.tensor([0.8] * 5 + [0.0], dtype=torch.float64).expand(1, 3, 6)
    torch.testing.assert_close(weights.sum(-2), wanted, rtol=1e-6, atol=1e-6)


def test_a_plan_is_the_best_among_plans() -> None:
    """<T, S> + H(T) is least changed by moving mass around a rectangle: the optimum of a concave function."""
    scores = torch.randn(4, 5, dtype=torch.float64)
    best = transport_plan(scores, None, 500)

    def value(t: Tensor) -> float:
        return float((t * scores).sum() - (t * t.log()).sum())

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        move = torch.zeros_like(best)
        i, k = torch.randperm(4, generator=generator)[:2].tolist()
        j, l = torch.randperm(5, generator=generator)[:2].tolist()  # noqa: E741
        move[i, j] = move[k, l] = 1e-3
        move[i, l] = move[k, j] = -1e-3
        assert value(best + move) < value(best)


def test_no_epsilon() -> None:
    with pytest.raises(ValueError, match="epsilon=0"):
        Sinkhorn(12, 3, epsilon=0.0)
