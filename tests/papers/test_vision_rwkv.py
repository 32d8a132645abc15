"""Bidirectional RWKV against the closed form, cell by cell."""

import pytest
import torch

from manyheads.mechanisms.recurrent.vision_rwkv import VisionRWKV


def build(dim=5, **config):
    torch.manual_seed(0)
    module = VisionRWKV(dim, 1, **config).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def shifted(x):
    """Channel by channel and cell by cell; x [height, width, e]"""
    height, width, dim = x.shape
    y = torch.zeros_like(x)
    for c in range(dim):
        quarter = next(part for part in range(4) if c < dim * (part + 1) // 4)
        down, across = ((0, -1), (0, 1), (-1, 0), (1, 0))[quarter]
        for i in range(height):
            for j in range(width):
                if 0 <= i + down < height and 0 <= j + across < width:
                    y[i, j, c] = x[i + down, j + across, c]
    return y


def by_pairs(module, x):
    moved, n = shifted(x), x.shape[0] * x.shape[1]
    k, v, r = (
        layer(x * mu + moved * (1 - mu)).flatten(0, 1)
        for layer, mu in (
            (module.key, module.spatial_mix_k),
            (module.value, module.spatial_mix_v),
            (module.receptance, module.spatial_mix_r),
        )
    )
    w, u, y = module.spatial_decay / n, module.spatial_first / n, torch.zeros_like(v)
    for t in range(n):
        weights = torch.stack([k[i] - (abs(t - i) - 1) * w if i != t else u + k[t] for i in range(n)]).softmax(0)
        y[t] = (weights * v).sum(0)
    y = y if module.key_norm is None else module.key_norm(y)
    return module.output(r.sigmoid() * y).view(x.shape)


@pytest.mark.parametrize("config", [{}, {"layer": 11}, {"dim": 8, "key_norm": True}, {"layer": 0, "depth": 1}])
@torch.no_grad()
def test_equation(config):
    module = build(**config)
    x = torch.randn(2, 5, 4, module.dim).double()
    torch.testing.assert_close(module(x).output[1], by_pairs(module, x[1]))
    mask = torch.ones(2, 5, 4, dtype=torch.bool)
    mask[1, 4], mask[1, :, 3] = False, False
    torch.testing.assert_close(module(x, mask=mask).output[1, :4, :3], by_pairs(module, x[1, :4, :3]))


@pytest.mark.parametrize("decay", [-3000.0, 3000.0])
@torch.no_grad()
def test_steep_decays_and_large_keys_stay_exact(decay):
    module, x = build(), 30 * torch.randn(1, 6, 7, 5).double()
    module.spatial_decay.fill_(decay)
    torch.testing.assert_close(module(x).output[0], by_pairs(module, x[0]))


def test_the_first_values_are_those_released():
    module = VisionRWKV(8, 1, layer=3, depth=12)
    middle = -5 + 8 * (3 / 7) ** (0.7 + 1.3 * 3 / 11)
    torch.testing.assert_close(module.spatial_decay[[0, 3, 7]], torch.tensor([-5.0, middle, 3.0]))
    torch.testing.assert_close(module.spatial_mix_k[4], torch.tensor(0.5**0.75))
    torch.testing.assert_close(module.spatial_mix_v[4], torch.tensor(0.5**0.75 + 0.3 * 3 / 11))
    assert sum(p.numel() for p in module.parameters()) == 4 * 64 + 5 * 8


def test_refusals():
    with pytest.raises(ValueError, match="0 <= layer < depth"):
        build(layer=12)
