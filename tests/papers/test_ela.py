"""Efficient local attention against torch's convolution and group norm, and against a loop."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.ela import EfficientLocalAttention


def build(dim=8, heads=2, **config):
    torch.manual_seed(0)
    module = EfficientLocalAttention(dim, heads, **config).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def gate(module, line):
    """line [n, 8]"""
    n, dim = line.shape
    weight, reach = module.conv.weight, module.conv.weight.shape[-1] // 2
    together, found = weight.shape[1], torch.zeros_like(line)
    for place in range(n):
        for channel in range(dim):
            first = channel // together * together
            for tap in range(-reach, reach + 1):
                if 0 <= place + tap < n:
                    found[place, channel] += (
                        weight[channel, :, tap + reach] @ line[place + tap, first : first + together]
                    )
    return F.group_norm(found.T[None], module.heads, module.norm.weight, module.norm.bias)[0].T.sigmoid()


def by_loops(module, x):
    return x * gate(module, x.mean(1))[:, None] * gate(module, x.mean(0))[None]


@pytest.mark.parametrize("config", [{}, {"kernel": 5, "together": 4}, {"heads": 8}])
@torch.no_grad()
def test_equation(config):
    module, x = build(**config), torch.randn(2, 6, 4, 8).double()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1]))
    mask = torch.ones(2, 6, 4, dtype=torch.bool)
    mask[1, 4:], mask[1, :, 3] = False, False
    torch.testing.assert_close(module(x, mask=mask).output[1, :4, :3], by_loops(module, x[1, :4, :3]))


def test_one_convolution_and_one_norm_serve_both_directions():
    sizes = {name: p.numel() for name, p in build(32, 16, kernel=7, together=8).named_parameters()}
    assert sizes == {"conv.weight": 32 * 8 * 7, "norm.weight": 32, "norm.bias": 32}


@torch.no_grad()
def test_axes_change_places():
    module, x = build(), torch.randn(2, 5, 3, 8).double()
    torch.testing.assert_close(module(x.transpose(1, 2)).output, module(x).output.transpose(1, 2))


def test_refusals():
    with pytest.raises(ValueError, match="dim=16 is not divisible by heads=32"):
        build(16, 32)
    for wrong in ({"kernel": 4}, {"together": 3}):
        with pytest.raises(ValueError, match="efficient-local-attention: kernel"):
            build(**wrong)
