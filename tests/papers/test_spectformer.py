"""The spectral gate against sums of waves, and the split into spectral and attention layers."""

import cmath

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.spectformer import SpectFormer


def build(dim=4, heads=2, **config):
    torch.manual_seed(0)
    return SpectFormer(dim, heads, **config).double().eval()


def by_waves(weight, x):
    """x [height, width, e], weight [height, width // 2 + 1, e] complex"""
    height, width, _ = x.shape
    y = torch.zeros_like(x)
    cells = [(i, j) for i in range(height) for j in range(width)]
    for k in range(height):
        for m in range(width // 2 + 1):
            wave = {c: cmath.exp(-2j * cmath.pi * (k * c[0] / height + m * c[1] / width)) for c in cells}
            found = sum(wave[c] * x[c] for c in cells) * weight[k, m]
            twice = 1 if m == 0 or 2 * m == width else 2  # the other half of the spectrum is its mirror image
            for c in cells:
                y[c] += twice * (found * wave[c].conjugate()).real / (height * width)
    return y


@pytest.mark.parametrize("size", [(4, 5), (5, 4), (1, 1)])
@torch.no_grad()
def test_equation(size):
    height, width = size
    module, x = build(height=height, width=width), torch.randn(2, height, width, 4).double()
    assert module.complex_weight.shape == (height, width // 2 + 1, 4, 2)
    torch.testing.assert_close(module(x).output[1], by_waves(torch.view_as_complex(module.complex_weight), x[1]))


@torch.no_grad()
def test_other_sizes_get_interpolated_gates():
    module, x = build(height=5, width=8), torch.randn(2, 9, 4, 4).double()
    weight = torch.view_as_complex(module.complex_weight)
    rows = torch.stack([weight[i // 2] if i % 2 == 0 else (weight[i // 2] + weight[i // 2 + 1]) / 2 for i in range(9)])
    gate = rows[:, [0, 2, 4]]
    torch.testing.assert_close(module(x).output[0], by_waves(gate, x[0]))


@torch.no_grad()
def test_a_batch_of_several_sizes():
    module, x = build(height=5, width=6), torch.randn(3, 5, 6, 4).double()
    mask = torch.ones(3, 5, 6, dtype=torch.bool)
    mask[1, 3:], mask[2] = False, False
    output = module(x, mask=mask).output
    torch.testing.assert_close(output[0], module(x[:1]).output[0])
    torch.testing.assert_close(output[1, :3], module(x[1:2, :3]).output[0])
    assert not bool(output[2].any())


@torch.no_grad()
def test_layers_from_alpha_on_attend():
    module, x = build(layer=4), torch.randn(2, 3, 4, 4).double()
    assert module.complex_weight is None
    assert sum(p.numel() for p in module.parameters()) == 4 * (4 * 4 + 4)
    layer, rows = module.attention, x.flatten(1, 2)
    q, k, v = (p(rows).unflatten(-1, (2, 2)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    wanted = layer.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x).output.flatten(1, 2), wanted)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[:, 2:] = False
    torch.testing.assert_close(module(x, mask=mask).output[:, :2], module(x[:, :2]).output)
    assert build(layer=3).attention is None
    assert build(layer=3, alpha=3).attention is not None


def test_refusals():
    for wrong in ({"layer": -1}, {"height": 0}):
        with pytest.raises(ValueError, match="spectformer: layer"):
            build(**wrong)
