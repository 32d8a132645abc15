"""Fusion of two modalities against torch's layers and loops over cells."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.ssma import SSMA


def build(**config):
    torch.manual_seed(0)
    module = SSMA(6, **{"reduction": 4, **config}).double().eval()
    if module.norm is not None:
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2)
    return module


def around(conv, x):
    """A 3x3 convolution of x [h, w, c] by loops, zeros outside."""
    height, width, _ = x.shape
    out = torch.zeros(height, width, conv.out_channels).double()
    for i in range(height):
        for j in range(width):
            out[i, j] = conv.bias
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < height and 0 <= j + dj < width:
                        out[i, j] += conv.weight[:, :, di + 1, dj + 1] @ x[i + di, j + dj]
    return out


def by_loops(module, a, b):
    x = torch.cat([a, b], -1)
    gated = x * torch.sigmoid(around(module.wide, F.relu(around(module.narrow, x))))
    if module.norm is None:
        return around(module.out, gated)
    norm = module.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (gated @ module.out.weight.T - norm.running_mean) * scale + norm.bias


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_equation(skip):
    module, (a, b) = build(skip=skip), torch.randn(2, 2, 4, 5, 6).double()
    torch.testing.assert_close(module((a, b)).output[1], by_loops(module, a[1], b[1]))


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_padded_maps_give_what_smaller_ones_give(skip):
    module, (a, b) = build(skip=skip), torch.randn(2, 2, 4, 5, 6).double()
    real = F.pad(torch.ones(2, 4, 5, dtype=torch.bool), (0, 1, 0, 2))
    given = tuple(F.pad(one, (0, 0, 0, 1, 0, 2), value=50.0) for one in (a, b))
    found = module(given, mask=(real, torch.ones_like(real))).output
    torch.testing.assert_close(found[real], module((a, b)).output.flatten(0, 2))


@torch.no_grad()
def test_either_modality_gates_the_other():
    module, (a, b) = build(), torch.randn(2, 1, 3, 3, 6).double()
    module.out.weight[:, 6:] = 0  # what is left of a
    assert (module((a, b)).output - module((a, 2 * b)).output).abs().max() > 1e-4


def test_as_many_parameters_as_published():
    # Behind the encoder: 512 -> 32 -> 512 by 3x3, then 256 by 1x1 and its norm; skips 48 -> 8 -> 48, then 24 by 3x3.
    count = [sum(p.numel() for p in m.parameters()) for m in (SSMA(256), SSMA(24, reduction=6, skip=True))]
    assert count[0] == 512 * 32 * 9 + 32 + 32 * 512 * 9 + 512 + 512 * 256 + 2 * 256
    assert count[1] == 48 * 8 * 9 + 8 + 8 * 48 * 9 + 48 + 48 * 24 * 9 + 24


def test_refusals():
    with pytest.raises(ValueError, match=r"reduction=40"):
        build(reduction=40)
    with pytest.raises(ValueError, match="want two of one size"):
        build()((torch.zeros(1, 3, 3, 6).double(), torch.zeros(1, 3, 4, 6).double()))
