"""Attention gates against torch's own layers and against loops."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.attention_gate import AttentionGate


def build(**config):
    torch.manual_seed(0)
    module = AttentionGate(6, **{"gate_dim": 10, **config}).double().eval()
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    return module


def first(t):
    return t.movedim(-1, 1)


def by_torch(module, skip, coarse):
    """As the released layer computes, features first."""
    axes = module.map_axes
    conv, mode = (F.conv2d, "bilinear") if axes == 2 else (F.conv3d, "trilinear")

    def one(layer, t):
        return conv(t, layer.weight.reshape(*layer.weight.shape, *(1,) * axes), layer.bias)

    x, g = first(skip), first(coarse)
    t = conv(x, module.theta.weight, stride=module.step)
    p = F.interpolate(one(module.gate, g), t.shape[2:], mode=mode, align_corners=False)
    a = torch.sigmoid(one(module.score, F.relu(t + p)))
    a = F.interpolate(a, x.shape[2:], mode=mode, align_corners=False)
    y = one(module.out, a * x)
    norm = module.norm
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return y.movedim(1, -1)


@pytest.mark.parametrize(
    ("config", "fine", "coarse"),
    [
        ({}, (8, 6), (4, 3)),
        ({}, (7, 5), (4, 3)),
        ({"step": 1}, (5, 4), (2, 3)),
        ({"step": 3, "inner": 4}, (9, 7), (2, 2)),
        ({"axes": 3}, (4, 6, 5), (2, 3, 2)),
    ],
)
@torch.no_grad()
def test_equation(config, fine, coarse):
    module = build(**config)
    maps = torch.randn(2, *fine, 6).double(), torch.randn(2, *coarse, 10).double()
    torch.testing.assert_close(module(maps).output, by_torch(module, *maps))


@pytest.mark.parametrize(
    ("axes", "small", "small_g"), [(2, (5, 4), (3, 2)), (2, (1, 3), (1, 1)), (3, (3, 4, 5), (2, 2, 3))]
)
@torch.no_grad()
def test_padded_maps_give_what_smaller_ones_give(axes, small, small_g):
    module = build(axes=axes)
    skip, coarse = torch.randn(2, *small, 6).double(), torch.randn(2, *small_g, 10).double()
    wanted = module((skip, coarse)).output
    given, masks = [], []
    for one in (skip, coarse):
        more = [part for _ in range(axes) for part in (0, 3)]
        given.append(F.pad(one, (0, 0, *more), value=50.0))
        masks.append(F.pad(torch.ones(one.shape[:-1], dtype=torch.bool), more))
    found = module(tuple(given), mask=tuple(masks)).output
    torch.testing.assert_close(found[masks[0]], wanted.flatten(0, -2))


def test_training_counts_real_cells_only():
    skip, coarse = torch.randn(2, 4, 4, 6).double(), torch.randn(2, 2, 2, 10).double()
    wanted, found = build().train(), build().train()
    wanted((skip, coarse))
    real = F.pad(torch.ones(2, 4, 4, dtype=torch.bool), (0, 2, 0, 2))
    found((F.pad(skip, (0, 0, 0, 2, 0, 2)), coarse), mask=(real, torch.ones(2, 2, 2, dtype=torch.bool)))
    torch.testing.assert_close(found.norm.running_mean, wanted.norm.running_mean)
    torch.testing.assert_close(found.norm.running_var, wanted.norm.running_var)


def test_as_many_parameters_as_released():
    # 16 features gated by 64: theta 8 x 16 x 4, phi 8 x 64 + 8, psi 8 + 1, W 16 x 16 + 16 and its norm of 32.
    assert sum(p.numel() for p in AttentionGate(16, gate_dim=64).parameters()) == 512 + 520 + 9 + 272 + 32


def test_refusals():
    with pytest.raises(ValueError, match=r"axes=4"):
        build(axes=4)
    with pytest.raises(ValueError, match=r"step=0"):
        build(step=0)
    with pytest.raises(ValueError, match=r"map 0 has shape .*depth, height, width, 6"):
        build(axes=3)((torch.zeros(1, 4, 4, 6).double(), torch.zeros(1, 2, 2, 10).double()))
