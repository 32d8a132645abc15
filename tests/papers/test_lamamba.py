"""The LaMamba block against loops over the cells of each window; its scans are tested with the functional."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.functional.grid_scans import snake_paths
from manyheads.mechanisms.recurrent.lamamba import LaMamba


def build(**config):
    torch.manual_seed(0)
    module = LaMamba(8, 2, **{"window": 3, "state": 2, **config}).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def by_windows(module, x):
    """Attention of x [height, width, 8], pixel by pixel, to those whose window is the same."""
    height, width, _ = x.shape
    size, shift, layer, y = module.window, module.shift, module.attn, torch.zeros_like(x)
    cells = [(i, j) for i in range(height) for j in range(width)]
    for a in cells:
        near = [c for c in cells if all((p - shift) // size == (q - shift) // size for p, q in zip(a, c, strict=True))]
        heads = []
        for h in range(2):
            cut = slice(4 * h, 4 * h + 4)
            q, table = layer.q_proj(x[a])[cut], module.places.weight[:, h].view(2 * size - 1, 2 * size - 1)
            score = torch.stack(
                [q @ layer.k_proj(x[c])[cut] / 2 + table[a[0] - c[0] + size - 1, a[1] - c[1] + size - 1] for c in near]
            )
            heads.append(score.softmax(0) @ torch.stack([layer.v_proj(x[c])[cut] for c in near]))
        y[a] = layer.o_proj(torch.cat(heads))
    return y


def by_parts(module, x, t):
    made = module.modulation(F.silu(module.condition_projection(t))).chunk(9)
    height, width, _ = x.shape
    u, z = module.scan.in_proj(module.norm(x) * (1 + made[1]) + made[0]).chunk(2, -1)
    conv = module.scan.conv2d
    u = F.silu(F.conv2d(u.permute(2, 0, 1)[None], conv.weight, padding=1, groups=16)[0].permute(1, 2, 0))
    paths = snake_paths(torch.ones(1, height, width, dtype=torch.bool))
    scanned = module.scan.scan(u.reshape(1, -1, 16), paths, None).view(u.shape)
    x = x + made[2] * module.scan.out_proj(module.scan.out_norm(scanned) * F.silu(z))
    x = x + made[5] * by_windows(module, module.norm_swin(x) * (1 + made[4]) + made[3])
    inner = F.gelu(module.fc1(module.norm2(x) * (1 + made[7]) + made[6]))
    return x + made[8] * module.fc2(inner)


@pytest.mark.parametrize("config", [{}, {"shift": 1, "condition_dim": 5}, {"window": 8, "shift": 4}])
@torch.no_grad()
def test_equation(config):
    module, x = build(**config), torch.randn(2, 5, 4, 8).double()
    t = torch.randn(2, module.condition_dim).double()
    torch.testing.assert_close(module(x, condition=t).output[1], by_parts(module, x[1], t[1]))
    mask = torch.ones(2, 5, 4, dtype=torch.bool)
    mask[1, 4], mask[1, :, 3] = False, False
    found = module(x, mask=mask, condition=t).output[1, :4, :3]
    torch.testing.assert_close(found, by_parts(module, x[1, :4, :3], t[1]))


@torch.no_grad()
def test_it_begins_as_the_identity_and_goes_without_a_condition():
    x = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(LaMamba(8, 2)(x, condition=torch.randn(2, 8)).output, x)
    module, x = build(condition_dim=5), x.double()
    zeros = torch.zeros(2, 5).double()
    torch.testing.assert_close(module(x).output, module(x, condition=zeros).output)


def test_refusals():
    for wrong in ({"shift": 3}, {"window": 0}, {"mlp_ratio": 0.0}):
        with pytest.raises(ValueError, match="lamamba: window"):
            build(**wrong)
    with pytest.raises(ValueError, match=r"condition has shape \(3, 8\)"):
        build()(torch.randn(2, 4, 4, 8).double(), condition=torch.randn(3, 8).double())
