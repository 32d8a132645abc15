"""Lightweight convolution against loops over taps, for both ways of sharing kernels, and dynamic convolution."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.dynamic_convolution import DynamicConvolution
from manyheads.mechanisms.convolution.lightweight_convolution import LightweightConvolution
from manyheads.testing import check_mechanism


def build(**config):
    torch.manual_seed(0)
    return LightweightConvolution(12, 3, **config).double().eval()


def by_loops(module, x, real=None):
    """The equation, one tap of one channel of one token at a time."""
    (n, dim), k, heads = x.shape, module.kernel_size, module.heads
    gate = module.in_proj(x)
    u = gate[:, :dim] * torch.sigmoid(gate[:, dim:])
    left = k - 1 if module.causal else k // 2
    y = torch.zeros(n, dim, dtype=x.dtype)
    for t in range(n):
        for c in range(dim):
            head = c % heads if module.head_mapping == "interleaved" else c // (dim // heads)
            taps = module.kernel[head].exp()
            for tap in range(k):
                source = t - left + tap
                if 0 <= source < n and (real is None or real[source]):
                    y[t, c] += taps[tap] / taps.sum() * u[source, c]
    return module.out_proj(y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mapping", ["contiguous", "interleaved"])
@pytest.mark.parametrize("kernel_size", [2, 5, 9])
@torch.no_grad()
def test_equation(causal, mapping, kernel_size):
    module = build(causal=causal, head_mapping=mapping, kernel_size=kernel_size)
    x = torch.randn(2, 7, 12).double()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1]))
    real = torch.tensor([[True] * 7, [True, True, False, True, True, False, False]])
    for need_weights in (False, True):
        found = module(x, mask=real, need_weights=need_weights).output[1]
        torch.testing.assert_close(found[real[1]], by_loops(module, x[1], real[1])[real[1]])


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_is_dynamic_convolution_with_a_kernel_that_does_not_look(causal):
    light, dynamic = (
        build(causal=causal, kernel_size=4),
        DynamicConvolution(12, 3, causal=causal, kernel_size=4).double(),
    )
    light.in_proj.load_state_dict(dynamic.in_proj.state_dict())
    light.out_proj.load_state_dict(dynamic.out_proj.state_dict())
    dynamic.kernel_proj.weight.zero_()
    light.kernel.zero_()
    x = torch.randn(2, 9, 12).double()
    found, wanted = light(x, need_weights=True), dynamic(x, need_weights=True)
    torch.testing.assert_close(found.output, wanted.output)
    torch.testing.assert_close(found.weights, wanted.weights)


@torch.no_grad()
def test_mappings_are_one_permutation_of_channels_apart():
    near, far = build(kernel_size=5), build(kernel_size=5, head_mapping="interleaved")
    order = torch.arange(12).view(3, 4).T.flatten()  # channel c of far is channel order[c] of near
    far.load_state_dict(near.state_dict())
    far.in_proj.weight.copy_(near.in_proj.weight.view(2, 12, 12)[:, order].flatten(0, 1))
    far.in_proj.bias.copy_(near.in_proj.bias.view(2, 12)[:, order].flatten())
    far.out_proj.weight.copy_(near.out_proj.weight[:, order])
    x = torch.randn(2, 8, 12).double()
    torch.testing.assert_close(far(x).output, near(x).output)


@torch.no_grad()
def test_interleaved_weights_mix_strided_channels():
    module, x = build(causal=True, kernel_size=4, head_mapping="interleaved"), torch.randn(1, 9, 12).double()
    result = module(x, need_weights=True)
    u = F.glu(module.in_proj(x), -1).unflatten(-1, (4, 3)).permute(0, 3, 1, 2)  # [b, h, n, d]
    torch.testing.assert_close(module.out_proj((result.weights @ u).permute(0, 2, 3, 1).flatten(2)), result.output)


def test_first_weights_are_as_spread_as_in_the_released_module():
    """Its kernels are [heads, 1, kernel_size] to Xavier's rule: fan in kernel_size, fan out heads kernel_size."""
    kernel = LightweightConvolution(1024, 512, kernel_size=31).kernel
    bound = (6 / (31 + 512 * 31)) ** 0.5
    assert 0.99 * bound < kernel.abs().max() <= bound


def test_refusals():
    with pytest.raises(ValueError, match="kernel_size=1"):
        build(kernel_size=1)
    with pytest.raises(ValueError, match="head_mapping='mod'"):
        build(head_mapping="mod")


def test_interleaved_keeps_the_contract():
    properties = ["decode", "decode-padded", "dense-mask", "padding", "weights", "no-future"]
    check_mechanism(LightweightConvolution, config={"head_mapping": "interleaved"}, properties=properties)
