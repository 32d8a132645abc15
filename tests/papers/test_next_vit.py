"""Next-ViT's blocks against PyTorch's layers and loops, and the published number of parameters."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.next_vit import NextViT, NextViTConvolution


def build(cls, dim=16, **config):
    torch.manual_seed(0)
    module = cls(dim, 4, **config).double().eval()
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return module


def norm(layer, x):
    last = F.batch_norm(x.flatten(0, -2), layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return last.view_as(x)


def convolved(layer, x, head_dim):
    y = F.conv2d(x.permute(0, 3, 1, 2), layer.conv.weight, padding=1, groups=x.shape[-1] // head_dim)
    return layer.project(F.relu(norm(layer.norm, y.permute(0, 2, 3, 1))))


def embedded(layer, x, stride):
    if layer.project is None:
        return x
    pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), stride, stride, ceil_mode=True, count_include_pad=False)
    return norm(layer.norm, layer.project(pooled.permute(0, 2, 3, 1)))


@pytest.mark.parametrize(("stride", "features"), [(1, 16), (2, 16), (1, 32), (2, 32)])
@torch.no_grad()
def test_convolution_block(stride, features):
    module = build(NextViTConvolution, stride=stride, features=features)
    x = torch.randn(2, 5, 6, 16).double()
    y = embedded(module.embedding, x, stride)
    y = y + convolved(module.convolution, y, features // 4)
    y = y + module.mlp.down(F.relu(module.mlp.up(norm(module.norm, y))))
    result = module(x, need_weights=True)
    torch.testing.assert_close(result.output, y)
    assert result.weights is None


@pytest.mark.parametrize(("stride", "features", "reduce"), [(1, 16, 1), (1, 16, 2), (2, 32, 1), (1, 32, 3), (1, 16, 9)])
@torch.no_grad()
def test_transformer_block(stride, features, reduce):
    module, x = build(NextViT, stride=stride, features=features, reduce=reduce), torch.randn(2, 5, 6, 16).double()
    wide, head_dim = 3 * features // 4, features // 4
    a = embedded(module.embedding, x, stride)
    assert a.shape[-1] == wide
    z = norm(module.norm_attention, a).flatten(1, 2)
    area = min(reduce**2, z.shape[1])
    keys = F.avg_pool1d(z.transpose(1, 2), area).transpose(1, 2)  # along the rows, the last few left out
    keys = keys if reduce == 1 else norm(module.attention.norm, keys)
    layer = module.attention.heads
    q, k, v = (
        p(t).unflatten(-1, (3, head_dim)).transpose(1, 2)
        for p, t in ((layer.q_proj, z), (layer.k_proj, keys), (layer.v_proj, keys))
    )
    weights = (q @ k.mT / head_dim**0.5).softmax(-1)
    a = a + layer.o_proj((weights @ v).transpose(1, 2).flatten(2)).view_as(a)
    c = embedded(module.projection, a, 1)
    c = c + convolved(module.convolution, c, head_dim)
    y = torch.cat([a, c], -1)
    y = y + module.mlp.down(F.relu(module.mlp.up(norm(module.norm, y))))
    result = module(x, need_weights=True)
    torch.testing.assert_close(result.output, y)
    if stride == 1:
        spread = result.weights[:, :3, :, : weights.shape[-1] * area].unflatten(-1, (-1, area))
        torch.testing.assert_close(spread, (weights / area)[..., None].expand_as(spread))
        torch.testing.assert_close(result.weights[:, :3].sum(-1), torch.ones(2, 3, 30).double())
        assert not result.weights[:, 3].any()


@torch.no_grad()
def test_means_are_of_real_cells_in_their_order():
    module, x = build(NextViT, reduce=2), torch.randn(2, 5, 6, 16).double()
    real = torch.zeros(2, 5, 6, dtype=torch.bool)
    real[0, :4, :3] = real[1, :5, :5] = True
    found = module(x, mask=real).output
    torch.testing.assert_close(found[:1, :4, :3], module(x[:1, :4, :3]).output)
    torch.testing.assert_close(found[1:, :5, :5], module(x[1:, :5, :5]).output)
    assert bool(module(x, mask=torch.zeros_like(real)).output.isfinite().all())


def test_the_published_model_has_as_many_parameters():
    total, before = 0, 3
    for width in (64, 32, 64, 64):
        total, before = total + before * width * 9 + 2 * width, width
    plain = NextViTConvolution
    stages = [
        (1, 8, [(plain, 96)] * 3),
        (2, 4, [(plain, 192)] * 3 + [(NextViT, 256)]),
        (2, 2, ([(plain, 384)] * 4 + [(NextViT, 512)]) * 2),
        (2, 1, [(plain, 768)] * 2 + [(NextViT, 1024)]),
    ]
    for stride, reduce, blocks in stages:
        for i, (cls, size) in enumerate(blocks):
            more = {"reduce": reduce} if cls is NextViT else {}
            block = cls(before, size // 32, features=size, stride=stride if i == 0 else 1, **more)
            total, before = total + sum(p.numel() for p in block.parameters()), size
    assert total + 2 * 1024 + 1024 * 1000 + 1000 == 31_763_368  # nextvit_small


def test_refusals():
    for config in ({"features": 18}, {"stride": 3}, {"reduce": 0}):
        with pytest.raises(ValueError, match="next-vit"):
            build(NextViT, **config)
    with pytest.raises(ValueError, match="heads >= 3"):
        NextViT(16, 2)
