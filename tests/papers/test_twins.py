"""Twins' two attentions and its positions against loops, and the parameters of the published model."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.twins_position import TwinsPosition
from manyheads.mechanisms.grid.twins import TwinsGlobal, TwinsLocal


def build(cls, **config):
    torch.manual_seed(0)
    return cls(12, 4, **config).double().eval()


def attended(layer, x, source):
    """x [n, 12], source [m, 12], each head apart."""
    q, k, v = layer.q_proj(x), layer.k_proj(source), layer.v_proj(source)
    cuts = [slice(3 * h, 3 * h + 3) for h in range(4)]
    mixed = [(q[:, c] @ k[:, c].T / 3**0.5).softmax(-1) @ v[:, c] for c in cuts]
    return layer.o_proj(torch.cat(mixed, -1))


@torch.no_grad()
def test_local_attends_within_squares():
    module, x = build(TwinsLocal, window=3), torch.randn(1, 5, 7, 12).double()
    real = torch.ones(1, 5, 7, dtype=torch.bool)
    real[0, 1, 1] = real[0, 4, 6] = False
    for mask in (None, real):
        found = module(x, mask=mask).output[0]
        for top in (0, 3):
            for left in (0, 3, 6):
                square = (slice(top, top + 3), slice(left, left + 3))
                seen = torch.ones(5, 7, dtype=torch.bool) if mask is None else mask[0]
                cells = x[0][square][seen[square]]
                torch.testing.assert_close(found[square][seen[square]], attended(module.attention, cells, cells))


@torch.no_grad()
def test_global_attends_to_reduced_squares():
    module, x = build(TwinsGlobal, reduce=2), torch.randn(2, 4, 6, 12).double()
    kernel, shift = module.reduction.weight, module.reduction.bias
    coarse = torch.zeros(2, 2, 3, 12).double()
    for i in range(2):
        for j in range(3):
            square = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            coarse[:, i, j] = torch.einsum("bhwc,ochw->bo", square, kernel) + shift
    coarse = F.layer_norm(coarse, (12,), module.norm.weight, module.norm.bias, 1e-5).flatten(1, 2)
    for row in range(2):
        wanted = attended(module.attention, x[row].flatten(0, 1), coarse[row])
        torch.testing.assert_close(module(x).output[row].flatten(0, 1), wanted)
    weights = module(x, need_weights=True).weights.unflatten(-1, (4, 6))
    torch.testing.assert_close(weights[..., 0, 0], weights[..., 1, 1])
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 4, 24).double())
    odd, real = torch.randn(1, 5, 5, 12).double(), torch.ones(1, 5, 5, dtype=torch.bool)
    real[:, 4] = real[:, 2, 2:4] = False
    spread = module(odd, mask=real, need_weights=True).weights
    torch.testing.assert_close(spread.sum(-1), torch.ones(1, 4, 25).double())
    assert not spread[..., ~real[0].flatten()].any()


@torch.no_grad()
def test_no_reduction_and_one_square_are_plain_attention():
    x = torch.randn(1, 3, 4, 12).double()
    for module in (build(TwinsGlobal, reduce=1), build(TwinsLocal, window=9)):
        wanted = attended(module.attention, x[0].flatten(0, 1), x[0].flatten(0, 1))
        torch.testing.assert_close(module(x).output[0].flatten(0, 1), wanted)


@torch.no_grad()
def test_positions_come_of_neighbours():
    module, x = build(TwinsPosition), torch.randn(1, 4, 5, 12).double()
    found = module(x).output
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    for i in range(4):
        for j in range(5):
            around = padded[0, i : i + 3, j : j + 3]
            wanted = (around * module.conv.weight[:, 0].permute(1, 2, 0)).sum((0, 1)) + module.conv.bias
            torch.testing.assert_close(found[0, i, j], wanted)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_published_model_has_as_many_parameters():
    dims, heads, depths, reduces = (64, 128, 256, 512), (2, 4, 8, 16), (2, 2, 10, 4), (8, 4, 2, 1)
    total, before, patch = 0, 3, 4
    for dim, head, depth, reduce in zip(dims, heads, depths, reduces, strict=True):
        total += before * dim * patch**2 + dim + 2 * dim  # patches and their norm
        around = 2 * 2 * dim + 8 * dim * dim + 5 * dim  # two norms and an MLP of ratio 4
        pair = count(TwinsLocal(dim, head), TwinsGlobal(dim, head, reduce=reduce))
        total += depth // 2 * (pair + 2 * around) + count(TwinsPosition(dim, head))
        before, patch = dim, 2
    assert total + 2 * 512 + 512 * 1000 + 1000 == 24_060_776  # twins_svt_small


def test_refusals():
    with pytest.raises(ValueError, match=r"'window': 0"):
        build(TwinsLocal, window=0)
    with pytest.raises(ValueError, match=r"'reduce': 0"):
        build(TwinsGlobal, reduce=0)
    with pytest.raises(ValueError, match=r"kernel=2"):
        build(TwinsPosition, kernel=2)
