"""Focal modulation against loops over cells and taps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manyheads.mechanisms.convolution.focal_modulation import FocalModulation


def build(**config):
    torch.manual_seed(0)
    return FocalModulation(6, 1, **config).double().eval()


def by_loops(module, x):
    """x [height, width, 6]"""
    height, width, dim = x.shape
    q, level, gates = module.f(x).split([dim, dim, module.levels + 1], -1)
    summed = torch.zeros_like(x)
    for number, conv in enumerate(module.convs):
        reach, found = conv.weight.shape[-1] // 2, torch.zeros_like(x)
        for i in range(height):
            for j in range(width):
                for a in range(max(0, i - reach), min(height, i + reach + 1)):
                    for c in range(max(0, j - reach), min(width, j + reach + 1)):
                        found[i, j] += conv.weight[:, 0, a - i + reach, c - j + reach] * level[a, c]
        level = F.gelu(found)
        summed += level * gates[..., number, None]
    summed += F.gelu(level.mean((0, 1))) * gates[..., -1:]
    if module.share != 1:
        summed = summed / (module.levels + 1)
    modulated = q * module.h(summed)
    return module.proj(modulated if module.norm is None else module.norm(modulated))


@pytest.mark.parametrize(
    "config", [{}, {"levels": 3, "window": 1}, {"factor": 4, "normalise": True, "post_norm": True}]
)
@torch.no_grad()
def test_equation(config):
    module, x = build(**config), torch.randn(2, 5, 4, 6).double()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1]))
    mask = torch.ones(2, 5, 4, dtype=torch.bool)
    mask[1, :, 3] = False
    torch.testing.assert_close(module(x, mask=mask).output[1, :, :3], by_loops(module, x[1, :, :3]))


def test_parameters_of_the_published_tiny_network():
    total = sum(p.numel() for p in nn.Conv2d(3, 96, 4).parameters()) + 2 * 96
    for stage, depth in enumerate((2, 2, 6, 2)):
        dim = 96 * 2**stage
        mixer = sum(p.numel() for p in FocalModulation(dim, 1).parameters())
        total += depth * (mixer + 4 * dim + 8 * dim * dim + 5 * dim)  # two LayerNorms and an MLP four times as wide
        if stage:
            total += 2 * 2 * dim // 2 * dim + dim + 2 * dim  # a 2 x 2 convolution and a LayerNorm
    assert total + 2 * 768 + 769 * 1000 == 28_427_116


def test_refusals():
    for wrong in ({"levels": 0}, {"window": 4}, {"factor": 1}):
        with pytest.raises(ValueError, match="focal-modulation: levels"):
            build(**wrong)
