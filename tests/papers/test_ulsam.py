"""ULSAM subspace by subspace, with torch's own modules."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.ulsam import Ulsam


def build(dim=8, heads=2):
    torch.manual_seed(0)
    module = Ulsam(dim, heads).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def normed(norm, x, part, train):
    running = None if train else norm.running_mean[part], None if train else norm.running_var[part]
    return F.batch_norm(x, *running, norm.weight[part], norm.bias[part], training=train)


def by_subspaces(module, x, train):
    """x [b, height, width, 8]"""
    wide, outputs = 8 // module.heads, []
    for head in range(module.heads):
        cut = slice(head * wide, (head + 1) * wide)
        part = x[..., cut].permute(0, 3, 1, 2)
        inner = part * module.depthwise.weight[cut].view(1, -1, 1, 1) + module.depthwise.bias[cut].view(1, -1, 1, 1)
        inner = F.max_pool2d(F.relu(normed(module.norm_in, inner, cut, train)), 3, 1, 1)
        one = F.conv2d(inner, module.point.weight[head : head + 1], module.point.bias[head : head + 1])
        one = F.relu(normed(module.norm_out, one, slice(head, head + 1), train))
        outputs.append(part + part * one.flatten(1).softmax(-1).view_as(one))
    return torch.cat(outputs, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("train", [False, True])
@torch.no_grad()
def test_equation(train):
    module, x = build().train(train), torch.randn(3, 5, 4, 8).double()
    module.norm_in.running_mean.normal_()
    torch.testing.assert_close(module(x).output, by_subspaces(module, x, train))
    mask = torch.ones(3, 5, 4, dtype=torch.bool)
    mask[:, 3:] = False
    torch.testing.assert_close(module(x, mask=mask).output[:, :3], by_subspaces(module, x[:, :3], train))


@torch.no_grad()
def test_parameters_and_maps():
    """Per subspace G + G, 2 G, G + 1 and 2."""
    assert sum(p.numel() for p in build(32, 4).parameters()) == 4 * (8 + 8 + 16 + 9 + 2)
    mask = torch.rand(2, 5, 4) < 0.5
    maps = build().eval().maps(torch.randn(2, 5, 4, 8).double(), mask=mask)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2, 2).double())
    assert bool((maps[~mask] == 0).all())


def test_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="dim=9"):
        Ulsam(9, 4)
