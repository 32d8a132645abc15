"""Orthogonal fusion cell by cell, and that what is left of the local features is orthogonal to the global vector."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.dolg import DOLG


def build(**config):
    torch.manual_seed(0)
    module = DOLG(8, **{"atrous": [], **config}).double().eval()
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    return module


def local_cells(module, x):
    """x [h, w, c] -> the weighed local features of each cell."""
    norm, cells = module.norm, []
    for cell in x.flatten(0, 1):
        u = (module.local(cell) - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        cells.append(u / u.norm() * (1 + module.score(F.relu(u)).exp()).log())
    return cells


def by_cells(module, x, z):
    mean = sum(c.clamp(min=1e-6) ** module.power for c in z.flatten(0, 1)) / z[..., 0].numel()
    g = module.project(mean ** (1 / module.power))
    left = [c - (g @ c) / (g @ g) * g for c in local_cells(module, x)]
    return g, left, module.out(torch.cat([g, sum(left) / len(left)]))


@pytest.mark.parametrize("power", [3.0, 1.5])
@torch.no_grad()
def test_equation(power):
    module, x, z = build(power=power), torch.randn(2, 3, 4, 8).double(), torch.randn(2, 2, 2, 16).double()
    g, left, wanted = by_cells(module, x[1], z[1])
    torch.testing.assert_close(module((x, z)).output[1, 0, 0], wanted)
    torch.testing.assert_close(torch.stack(left) @ g, torch.zeros(12).double())


@torch.no_grad()
def test_atrous_against_torch():
    module, x, z = build(atrous=[1, 2]), torch.randn(1, 4, 5, 8).double(), torch.randn(1, 2, 2, 16).double()
    first = x.movedim(-1, 1)
    parts = [
        F.relu(module.pooled(x.mean((1, 2)))).view(1, 4, 1, 1).expand(-1, -1, 4, 5),
        module.pointwise(x).movedim(-1, 1),
    ]
    for step, conv in zip((1, 2), module.dilated, strict=True):
        parts.append(F.conv2d(first, conv.weight, conv.bias, padding=step, dilation=step))
    joined = F.relu(module.joined(torch.cat(parts, 1).movedim(1, -1)))
    module.atrous = False
    wanted = module((joined, z)).output
    module.atrous = True
    torch.testing.assert_close(module((x, z)).output, wanted)


@pytest.mark.parametrize("atrous", [[], [2]])
@torch.no_grad()
def test_padded_maps_give_what_smaller_ones_give(atrous):
    module, x, z = build(atrous=atrous), torch.randn(2, 3, 4, 8).double(), torch.randn(2, 2, 2, 16).double()
    masks = [F.pad(torch.ones(t.shape[:3], dtype=torch.bool), (0, 2, 0, 1)) for t in (x, z)]
    given = tuple(F.pad(t, (0, 0, 0, 2, 0, 1), value=50.0) for t in (x, z))
    torch.testing.assert_close(module(given, mask=tuple(masks)).output, module((x, z)).output)


def test_as_many_parameters_as_released():
    # fc_t 2048 -> 1024, conv1 1024 -> 1024, its norm, conv2 1024 -> 1, fc 2048 -> 512.
    wanted = 2048 * 1024 + 1024 + 1024 * 1024 + 1024 + 2 * 1024 + 1025 + 2048 * 512 + 512
    assert sum(p.numel() for p in DOLG(1024, atrous=[]).parameters()) == wanted


def test_refusals():
    with pytest.raises(ValueError, match=r"power=0"):
        build(power=0.0)
    with pytest.raises(ValueError, match=r"atrous=\[0\]"):
        build(atrous=[0])
