"""Large kernel attention against loops over cells and taps."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.van import LargeKernelAttention


def build(dim=4, **config):
    torch.manual_seed(0)
    return LargeKernelAttention(dim, 1, **config).double().eval()


def spread(conv, x):
    """A depthwise convolution, tap by tap; x [height, width, e]"""
    taps, step, found = conv.weight.shape[-1], conv.dilation[0], torch.zeros_like(x) + conv.bias
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            for a in range(taps):
                for c in range(taps):
                    row, column = i + (a - taps // 2) * step, j + (c - taps // 2) * step
                    if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                        found[i, j] += conv.weight[:, 0, a, c] * x[row, column]
    return found


def by_loops(module, x):
    u = F.gelu(module.proj_1(x))
    return x + module.proj_2(u * module.point(spread(module.far, spread(module.near, u))))


@pytest.mark.parametrize("config", [{}, {"kernel": 9, "dilation": 2}, {"kernel": 5, "dilation": 1}])
@torch.no_grad()
def test_equation(config):
    module, x = build(**config), torch.randn(2, 7, 5, 4).double()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1]))
    mask = torch.ones(2, 7, 5, dtype=torch.bool)
    mask[1, 5:] = False
    torch.testing.assert_close(module(x, mask=mask).output[1, :5], by_loops(module, x[1, :5]))


def test_taps_and_parameters():
    """Per channel 25 + 1, 49 + 1 and dim + 1 in the kernel, and two maps around it; VAN-B0 as published."""
    module = build(dim=32)
    gate = sum(p.numel() for part in (module.near, module.far, module.point) for p in part.parameters())
    assert gate == 32 * (26 + 50) + 32 * 32 + 32
    total, before = 0, 3
    for stage, (dim, depth, wide) in enumerate([(32, 3, 8), (64, 3, 8), (160, 5, 4), (256, 2, 4)]):
        mixer, hidden = sum(p.numel() for p in build(dim=dim).parameters()), wide * dim
        mlp = dim * hidden + hidden + 10 * hidden + hidden * dim + dim
        embed = before * dim * (49 if stage == 0 else 9) + dim + 2 * dim
        total += embed + depth * (mixer + mlp + 4 * dim + 2 * dim) + 2 * dim  # BatchNorms, layer scales, LayerNorm
        before = dim
    assert total + 257 * 1000 == 4_105_800


def test_refusals():
    for wrong in ({"dilation": 0}, {"kernel": 12}, {"kernel": 0}):
        with pytest.raises(ValueError, match="large-kernel-attention: kernel"):
            build(**wrong)
