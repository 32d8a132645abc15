"""AGUNet's dual attention against a dense computation cell by cell."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.agunet import AGUNet


def build(**config):
    torch.manual_seed(0)
    module = AGUNet(16, **config).double().eval()
    with torch.no_grad():
        module.position.gamma.fill_(0.7)
        module.features.gamma.fill_(-0.4)
        for norm in (module.norm, module.position.norm, module.features.norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module


def normed(norm, cells):
    return F.batch_norm(cells, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def branch(part, t):
    """t [c, d, h, w]"""
    h = F.conv3d(t[None], part.first.weight, part.first.bias, padding=1)
    return F.conv3d(F.relu(normed(part.norm, h)), part.second.weight, part.second.bias, padding=1)[0]


def by_cells(module, x):
    """x [d, h, w, c]"""
    cells = x.flatten(0, 2)
    keys = [module.k_proj(c) for c in cells]
    values = [module.v_proj(c) for c in cells]
    attended = []
    for cell in cells:
        weight = torch.stack([module.q_proj(cell) @ k for k in keys]).exp()
        attended.append(sum(w * v for w, v in zip(weight / weight.sum(), values, strict=True)))
    features = torch.zeros_like(cells)
    alike = torch.softmax(torch.einsum("na,nb->ab", cells, cells), 1)
    for a in range(16):
        for b in range(16):
            features[:, b] += cells[:, a] * alike[a, b]
    parts = []
    for part, z in ((module.position, torch.stack(attended)), (module.features, features)):
        parts.append(branch(part, (part.gamma * z + cells).view(x.shape).movedim(-1, 0)).movedim(0, -1))
    return normed(module.norm, (module.out(sum(parts))).flatten(0, 2)).view(x.shape)


@torch.no_grad()
def test_equation():
    module, x = build(), 0.5 * torch.randn(2, 2, 3, 3, 16).double()
    torch.testing.assert_close(module(x).output[1], by_cells(module, x[1]))


@torch.no_grad()
def test_at_first_it_is_convolutions_only():
    torch.manual_seed(0)
    module = AGUNet(16).eval()
    x = torch.randn(1, 2, 2, 3, 16)
    wanted = sum(branch(part, x[0].movedim(-1, 0)).movedim(0, -1) for part in (module.position, module.features))
    torch.testing.assert_close(
        module(x).output[0], normed(module.norm, module.out(wanted).flatten(0, 2)).view(2, 2, 3, 16)
    )


@torch.no_grad()
def test_weights_times_values():
    module, x = build(heads=2), torch.randn(1, 2, 2, 3, 16).double()
    weights = module(x, need_weights=True).weights
    assert weights.shape == (1, 2, 12, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 12).double())


def test_refusals():
    with pytest.raises(ValueError, match=r"dropout=1"):
        AGUNet(16, dropout=1)
    with pytest.raises(ValueError, match="cannot be called grid"):
        build()(torch.zeros(1, 3, 3, 16).double())
