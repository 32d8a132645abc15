"""Gaussian adaptive attention on maps (arXiv:2401.11143) against loops over the lines of one axis."""

import math

import pytest
import torch

from manyheads.mechanisms.scoring.gaussian_adaptive import AXES, GaussianAdaptiveMap


def build(heads=2, **config):
    torch.manual_seed(0)
    module = GaussianAdaptiveMap(7, heads, **config).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def of_line(module, line):
    """w of one line of numbers, head by head."""
    n, found = len(line), []
    each = n // module.heads
    for h in range(module.heads):
        part = line[h * each : (h + 1) * each if h < module.heads - 1 else n]
        mean = sum(part) / max(len(part), 1)
        variance = sum((value - mean) ** 2 for value in part) / max(len(part) - 1, 1) + 1e-8
        terms = []
        for value in part:
            pairs = zip(module.mean_offsets[h].tolist(), module.widths[h].tolist(), strict=True)
            terms.append(-sum((value - mean - delta) ** 2 / variance / (2 * c**2) for delta, c in pairs))
        terms = [math.exp(term - max(terms)) for term in terms]  # small ones would all be zero
        found += [term / sum(terms) for term in terms]
    return found


@pytest.mark.parametrize("axis", list(AXES))
@pytest.mark.parametrize("heads", [1, 2, 3, 6])
@torch.no_grad()
def test_equation(axis, heads):
    module, x = build(heads, axis=axis), torch.randn(2, 5, 4, 7).double()
    mask = torch.ones(2, 5, 4, dtype=torch.bool)
    for given, part in (({}, x), ({"mask": mask}, x[:, :4, :3])):
        mask[:, 4], mask[:, :, 3] = False, False
        lines = part.movedim(AXES[axis], -1)
        wanted = torch.tensor(
            [of_line(module, line) for line in lines.reshape(-1, lines.shape[-1]).tolist()], dtype=torch.float64
        )
        wanted = wanted.view(lines.shape).movedim(-1, AXES[axis])
        output = module(x, **given).output[:, : part.shape[1], : part.shape[2]]
        torch.testing.assert_close(output, wanted * part)


@torch.no_grad()
def test_each_stretch_sums_to_one():
    w = build(2).densities(torch.randn(2, 5, 4, 7).double())
    torch.testing.assert_close(w[:, :2].sum(1), torch.ones(2, 4, 7).double())
    torch.testing.assert_close(w[:, 2:].sum(1), torch.ones(2, 4, 7).double())


def test_refusals():
    for wrong in ({"axis": "depth"}, {"gaussians": 0}):
        with pytest.raises(ValueError, match="gaussian-adaptive-map: axis"):
            build(**wrong)
