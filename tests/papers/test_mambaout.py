"""The gated CNN block against loops over cells and taps."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.mambaout import MambaOut


def build(dim=6, **config):
    torch.manual_seed(0)
    return MambaOut(dim, 1, **config).double().eval()


def by_loops(module, x):
    """x [height, width, 6]"""
    hidden, moved = module.fc2.weight.shape[1], module.conv.weight.shape[0]
    inner, reach = module.fc1(module.norm(x)), module.conv.weight.shape[-1] // 2
    gate, values = inner[..., :hidden], inner[..., hidden:].clone()
    found = torch.zeros_like(values[..., -moved:]) + module.conv.bias
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            for a in range(max(0, i - reach), min(x.shape[0], i + reach + 1)):
                for c in range(max(0, j - reach), min(x.shape[1], j + reach + 1)):
                    found[i, j] += module.conv.weight[:, 0, a - i + reach, c - j + reach] * values[a, c, -moved:]
    values = torch.cat([values[..., :-moved], found], -1)
    return x + module.fc2(F.gelu(gate) * values)


@pytest.mark.parametrize("config", [{}, {"kernel": 3, "conv_ratio": 0.5}, {"expansion": 2.0, "conv_ratio": 2.0}])
@torch.no_grad()
def test_equation(config):
    module, x = build(**config), torch.randn(2, 5, 4, 6).double()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1]))
    mask = torch.ones(2, 5, 4, dtype=torch.bool)
    mask[1, 3:] = False
    torch.testing.assert_close(module(x, mask=mask).output[1, :3], by_loops(module, x[1, :3]))


def test_parts_of_the_published_width():
    """Of int(8 / 3 dim) values as many as dim are convolve; with stem, steps and head the count of the femto model."""
    assert build(dim=48).widths == (128, 80, 48)
    dims, total = (48, 96, 192, 288), 3 * 24 * 9 + 24 + 48 + 24 * 48 * 9 + 48 + 96
    for stage, depth in enumerate((3, 3, 9, 3)):
        dim = dims[stage]
        total += depth * sum(p.numel() for p in build(dim=dim).parameters())
        if stage:
            total += dims[stage - 1] * dim * 9 + dim + 2 * dim
    head = 2 * 288 + 288 * 4 * 288 + 4 * 288 + 2 * 4 * 288 + 4 * 288 * 1000 + 1000
    assert total + head == 7_304_536


def test_refusals():
    for wrong in ({"kernel": 2}, {"conv_ratio": 0.0}, {"conv_ratio": 3.0}):
        with pytest.raises(ValueError, match="mambaout: kernel"):
            build(**wrong)
