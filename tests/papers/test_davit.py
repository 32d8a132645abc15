"""DaViT's blocks against loops, and the published number of parameters."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.davit import DaViTChannel, DaViTSpatial


def build(cls, **config):
    torch.manual_seed(0)
    return cls(12, 4, **config).double().eval()


def norm(layer, x):
    return F.layer_norm(x, (12,), layer.weight, layer.bias, 1e-5)


def conv(layer, x):
    return F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=1, groups=12).permute(0, 2, 3, 1)


def block(module, x, attend):
    b = module.block
    x = x + conv(b.position_attention, x)
    x = x + attend(norm(b.norm_attention, x))
    x = x + conv(b.position_mlp, x)
    return x + b.mlp.down(F.gelu(b.mlp.up(norm(b.norm_mlp, x))))


@torch.no_grad()
def test_spatial():
    module, x = build(DaViTSpatial, window=3), torch.randn(2, 5, 6, 12).double()
    layer = module.attention

    def attend(z):
        y = torch.zeros_like(z)
        for top in (0, 3):
            for left in (0, 3):
                cut = (slice(None), slice(top, top + 3), slice(left, left + 3))
                cells = z[cut].flatten(1, 2)
                q, k, v = (
                    p(cells).unflatten(-1, (4, 3)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
                )
                mixed = ((q @ k.mT / 3**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
                y[cut] = layer.o_proj(mixed).view_as(z[cut])
        return y

    torch.testing.assert_close(module(x).output, block(module, x, attend))


@torch.no_grad()
def test_channel():
    module, x = build(DaViTChannel), torch.randn(2, 5, 6, 12).double()

    def attend(z):
        y = torch.zeros_like(z)
        for row in range(2):
            q, k, v = (p(z[row].flatten(0, 1)) for p in (module.q_proj, module.k_proj, module.v_proj))
            mixed = torch.zeros(30, 12).double()
            for h in range(4):
                for c in range(3):
                    scores = torch.stack([(k[:, 3 * h + c] * v[:, 3 * h + d]).sum() / 3**0.5 for d in range(3)])
                    weights = scores.softmax(0)
                    mixed[:, 3 * h + c] = sum(weights[d] * q[:, 3 * h + d] for d in range(3))
            y[row] = module.o_proj(mixed).view(5, 6, 12)
        return y

    result = module(x, need_weights=True)
    torch.testing.assert_close(result.output, block(module, x, attend))
    assert result.weights is None


@pytest.mark.parametrize("cls", [DaViTSpatial, DaViTChannel])
@torch.no_grad()
def test_padding_in_the_middle_is_not_read(cls):
    module, x = build(cls), torch.randn(1, 5, 6, 12).double()
    real = torch.ones(1, 5, 6, dtype=torch.bool)
    real[0, 2, 2:4] = False
    one = module(x.masked_fill(~real[..., None], 3.0), mask=real).output
    other = module(x.masked_fill(~real[..., None], -7.0), mask=real).output
    torch.testing.assert_close(one[real], other[real])


def test_the_published_model_has_as_many_parameters():
    total, before, patch = 0, 3, 7
    for dim, heads, depth in zip((96, 192, 384, 768), (3, 6, 12, 24), (1, 1, 3, 1), strict=True):
        total += before * dim * patch**2 + dim + 2 * (dim if before == 3 else before)
        pair = (DaViTSpatial(dim, heads), DaViTChannel(dim, heads))
        total += depth * sum(p.numel() for module in pair for p in module.parameters())
        before, patch = dim, 2
    assert total + 2 * 768 + 768 * 1000 + 1000 == 28_360_168  # davit_tiny


def test_refusals():
    with pytest.raises(ValueError, match="window=0"):
        build(DaViTSpatial, window=0)
    with pytest.raises(ValueError, match="mlp_ratio=0"):
        build(DaViTChannel, mlp_ratio=0.0)
