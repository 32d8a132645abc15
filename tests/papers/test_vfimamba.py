"""The mixed state-space block against scans whose cells are picked one by one."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.recurrent.vfimamba import VFIMamba


def build(**config):
    torch.manual_seed(0)
    module = VFIMamba(6, 1, **{"state": 2, "compress": 2, "squeeze": 3, **config}).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def scan(part, way, cells):
    """One path over cells [n, e], state by state."""
    rank, state = part.widths[0], part.widths[1]
    h, outputs = torch.zeros(cells.shape[1], state).double(), []
    for u in cells:
        inner, given, read = part.x_proj[way](u).split([rank, state, state])
        step = F.softplus(part.dt_proj[way](inner))[:, None]
        h = (-step * part.A_logs[way].exp()).exp() * h + step * given * u[:, None]
        outputs.append(h @ read + part.Ds[way] * u)
    return torch.stack(outputs)


def conv(layer, x, groups=1):
    return F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=1, groups=groups).permute(0, 2, 3, 1)


def by_cells(module, x):
    """x [frames, height, width, 6]"""
    frames, height, width, _ = x.shape
    part = module.ss2d
    u, z = part.in_proj(module.norm_1(x)).chunk(2, -1)
    u = F.silu(conv(part.conv2d, u, groups=u.shape[-1]))
    rows = [(f, i, j) for i in range(height) for j in range(width) for f in range(frames)]
    columns = [(f, i, j) for j in range(width) for i in range(height) for f in range(frames)]
    total = torch.zeros_like(u)
    for way, path in enumerate((rows, columns, rows[::-1], columns[::-1])):
        for cell, y in zip(path, scan(part.scan, way, torch.stack([u[c] for c in path])), strict=True):
            total[cell] += y
    x = x * module.skip_1 + part.out_proj(part.out_norm(total) * F.silu(z))
    cab = module.cab
    found = conv(cab.conv_out, F.gelu(conv(cab.conv_in, module.norm_2(x))))
    gate = cab.excite(F.relu(cab.squeeze(found.mean((1, 2))))).sigmoid()
    return x * module.skip_2 + found * gate[:, None, None]


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 2), (3, 1, 2)])
@torch.no_grad()
def test_equation(shape):
    module, x = build(), torch.randn(2, *shape, 6).double()
    torch.testing.assert_close(module(x).output[1], by_cells(module, x[1]))


@torch.no_grad()
def test_padded_frames_and_cells():
    module, x = build(), torch.randn(1, 3, 4, 4, 6).double()
    mask = torch.ones(1, 3, 4, 4, dtype=torch.bool)
    mask[:, 2], mask[:, :, :, 3] = False, False
    found = module(x, mask=mask).output[0, :2, :, :3]
    torch.testing.assert_close(found, by_cells(module, x[0, :2, :, :3]))


@torch.no_grad()
def test_frames_see_each_other():
    module, x = build(), torch.randn(1, 2, 3, 3, 6).double()
    changed = x.clone()
    changed[0, 0, 1, 1, 0] += 1  # a LayerNorm does not see the same added to all
    gap = (module(changed).output - module(x).output)[0, 1].abs().amax(-1)
    assert bool((gap > 1e-9).all())


def test_refusals():
    with pytest.raises(ValueError, match="vfimamba: state=0"):
        build(state=0)
    with pytest.raises(ValueError, match="compress at most dim=6"):
        build(compress=7)
    with pytest.raises(ValueError, match="cannot be called grid"):
        build()(torch.randn(1, 3, 3, 6).double())
