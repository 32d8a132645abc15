"""The global HyperZZW operator against loops over rows and coordinates."""

import math

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.hyper_zzw import HyperZZW


def build(size=5, heads=4, **config):
    torch.manual_seed(0)
    module = HyperZZW(4, heads, size=size, hidden=6, layers=2, **config).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def kernel_at(slow, row, column):
    """The slow network at one place."""
    step = 2 / (slow.size - 1)
    place = [-1 + step * row, -1 + step * column]
    sines = []
    for layer in slow.filters:
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        sines.append(
            torch.tensor([math.sin(a * place[0] + b * place[1] + c) for (a, b), c in rows], dtype=torch.float64)
        )
    h = sines[0]
    for sine, linear in zip(sines[1:], slow.linears, strict=True):
        h = sine * (linear.weight @ h + linear.bias) + slow.place_bias[row, column]
    return slow.out.weight @ h + slow.out.bias


def by_loops(module, x):
    """One image, filled up with zeros to the size of the kernel."""
    height, width, dim = x.shape
    size = module.size
    z, values = torch.zeros(size, size, dim).double(), torch.zeros(size, size, dim).double()
    z[:height, :width] = x
    mixed = module.mixer(x).permute(2, 0, 1)[None]
    values[:height, :width] = F.instance_norm(mixed)[0].permute(1, 2, 0)
    y = torch.zeros(size, size, dim).double()
    for h in range(size):
        for v in range(size):
            weight = kernel_at(module.slow, h, v).repeat_interleave(4 // module.heads) * z[h, v]
            for w in range(size):
                y[h, w] += weight * values[v, w]
    return module.out_proj(y[:height, :width])


@pytest.mark.parametrize("shape", [(5, 5), (3, 3), (2, 4), (5, 3)])
@torch.no_grad()
def test_equation(shape):
    module, x = build(), torch.randn(2, *shape, 4).double()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1]))
    shared = build(heads=2)
    torch.testing.assert_close(shared(x).output[1], by_loops(shared, x[1]))


@torch.no_grad()
def test_padding_is_a_smaller_map():
    module, x = build(), torch.randn(1, 4, 5, 4).double()
    real = torch.zeros(1, 4, 5, dtype=torch.bool)
    real[:, :3, :4] = True
    found = module(x, mask=real).output[0, :3, :4]
    torch.testing.assert_close(found, by_loops(module, x[0, :3, :4]))


@torch.no_grad()
def test_the_kernel_depends_on_places_and_not_on_the_image():
    module, x = build(), torch.randn(1, 4, 4, 4).double()
    kernel = module.slow()
    torch.testing.assert_close(kernel[3, 1], kernel_at(module.slow, 3, 1))
    module.slow.out.weight.zero_()
    module.slow.out.bias.fill_(1.0)  # K = 1: the product of the two maps
    values = F.instance_norm(module.mixer(x).permute(0, 3, 1, 2))
    wanted = module.out_proj((x.permute(0, 3, 1, 2) @ values).permute(0, 2, 3, 1))
    torch.testing.assert_close(module(x).output, wanted)


def test_refusals():
    with pytest.raises(ValueError, match="size=6 or more"):
        build()(torch.randn(1, 3, 6, 4).double())
    with pytest.raises(ValueError, match="heads=3"):
        HyperZZW(4, 3)
    with pytest.raises(ValueError, match="layers=0"):
        HyperZZW(4, 4, layers=0)
