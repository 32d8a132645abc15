"""Gaussian adaptive attention (arXiv:2401.11143) against loops in the form of the released code."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.scoring.gaussian_adaptive import GaussianAdaptive, importance_factor


def densities(module: GaussianAdaptive, x: Tensor) -> Tensor:
    """x [n, dim] -> w [n, dim]."""
    n, dim = x.shape
    found = torch.zeros(n, dim, dtype=x.dtype)
    for f in range(dim):
        h = f // (dim // module.heads)
        column = [float(value) for value in x[:, f]]
        mean = sum(column) / n
        variance = sum((value - mean) ** 2 for value in column) / max(n - 1, 1) + 1e-8
        terms = []
        for value in column:
            product = 1.0
            for delta, c in zip(module.mean_offsets[h].tolist(), module.widths[h].tolist(), strict=True):
                y = (value - (mean + delta)) / math.sqrt(variance)
                product *= math.exp(-(y**2) / (2 * c**2)) / math.sqrt(2 * math.pi * c**2)
            terms.append(product)
        found[:, f] = torch.tensor([term / sum(terms) for term in terms])
    return found


@pytest.mark.parametrize("n", [1, 2, 7])
@torch.no_grad()
def test_equals_loops(n: int) -> None:
    module = GaussianAdaptive(6, 3, gaussians=3).double()
    module.mean_offsets.normal_()
    module.widths.uniform_(0.5, 2.0)
    if n == 1:
        module.mean_offsets.mul_(1e-5)
    x = torch.randn(2, n + 2, 6, dtype=torch.float64)
    mask = torch.arange(n + 2)[None] < torch.tensor([[n + 2], [n]])
    found, output = module.densities(x, mask=mask), module(x, mask=mask).output
    for row, real in enumerate((n + 2, n)):
        wanted = densities(module, x[row, :real])
        torch.testing.assert_close(found[row, :real], wanted)
        torch.testing.assert_close(output[row, :real], wanted * x[row, :real])
    assert (output[1, n:] == 0).all()


@torch.no_grad()
def test_one_centred_gaussian_prefers_the_mean() -> None:
    module = GaussianAdaptive(1, 1, gaussians=1)
    module.widths.fill_(1.0)
    weights = module.densities(torch.tensor([[[-2.0], [0.0], [2.0], [0.1], [-0.1]]]))[0, :, 0]
    assert weights.argmax() == 1
    torch.testing.assert_close(weights[0], weights[2])
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_importance_factor_runs_from_zero_to_one() -> None:
    w = torch.tensor([[0.1, 0.3], [0.2, 0.5]])
    torch.testing.assert_close(importance_factor(w), torch.tensor([[0.0, 0.5], [0.25, 1.0]]))
    torch.testing.assert_close(importance_factor(torch.full((3,), 0.2)), torch.zeros(3))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="gaussians=0"):
        GaussianAdaptive(6, 3, gaussians=0)
