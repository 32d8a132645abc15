"""Deformable convolution against loops over taps, and against a plain one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.deformed import DeformedConv2d


def cell(x: Tensor, row: int, column: int) -> Tensor:
    inside = 0 <= row < x.shape[1] and 0 <= column < x.shape[2]
    return x[:, row, column] if inside else torch.zeros_like(x[:, 0, 0])


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 1, 1), (3, 2, 1)])
@torch.no_grad()
def test_against_loops(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    layer = DeformedConv2d(3, 4, kernel, stride, padding).double()
    torch.nn.init.normal_(layer.offset.weight, std=0.6)
    x = torch.randn(2, 3, 5, 6).double()
    found, moved = layer(x)[1], layer.offset(x)[1]
    for i in range(found.shape[1]):
        for j in range(found.shape[2]):
            total = layer.bias.clone()
            for tap in range(kernel**2):
                down = i * stride - padding + tap // kernel + float(moved[2 * tap, i, j])
                right = j * stride - padding + tap % kernel + float(moved[2 * tap + 1, i, j])
                top, left = math.floor(down), math.floor(right)
                a, b = down - top, right - left
                near = [cell(x[1], top + m, left + n) for m in (0, 1) for n in (0, 1)]
                shares = [(1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b]
                read = torch.stack([share * own for share, own in zip(shares, near, strict=True)]).sum(0)
                total += layer.weight[:, :, tap // kernel, tap % kernel] @ read
            torch.testing.assert_close(found[:, i, j], total)


def test_begins_as_a_plain_convolution_and_learns_where_to_read() -> None:
    layer, x = DeformedConv2d(3, 4, 2, 2, 0).double(), torch.randn(2, 3, 5, 6).double()
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, 2))
    with torch.no_grad():
        layer.offset.weight.normal_(std=0.1)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in layer.parameters())


def test_gradients() -> None:
    torch.manual_seed(1)
    layer = DeformedConv2d(2, 2, 2, 1, 0).double()
    torch.nn.init.normal_(layer.offset.weight, std=0.3)
    x = torch.randn(1, 2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
