"""MaxViT's two attentions against loops, its block against PyTorch's layers, and the published number of parameters."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.maxvit import MaxViT, MaxViTBlock, MaxViTGrid


def build(cls, **config):
    torch.manual_seed(0)
    return cls(12, 4, **config).double().eval()


def by_loops(partition, x, group):
    """x [height, width, 12]; group: (i, j) -> which window, and where in it."""
    layer, table, p = partition.attention, partition.positions.table, partition.window
    height, width, _ = x.shape
    cells = [(i, j) for i in range(height) for j in range(width)]
    y = torch.zeros_like(x)
    for i, j in cells:
        window, (u, v) = group(i, j)
        others = [c for c in cells if group(*c)[0] == window]
        mixed = []
        for h in range(4):
            cut = slice(3 * h, 3 * h + 3)
            q = layer.q_proj(x[i, j])[cut]
            scores = []
            for c in others:
                a, b = group(*c)[1]
                offset = (u - a + p - 1) * (2 * p - 1) + v - b + p - 1
                scores.append(q @ layer.k_proj(x[c])[cut] / 3**0.5 + table[offset, h])
            weights = torch.stack(scores).softmax(0)
            mixed.append(sum(w * layer.v_proj(x[c])[cut] for w, c in zip(weights, others, strict=True)))
        y[i, j] = layer.o_proj(torch.cat(mixed))
    return y


def near(i, j):
    return (i // 3, j // 3), (i % 3, j % 3)


def apart(height, width):
    down, right = -(-height // 3), -(-width // 3)
    return lambda i, j: ((i % down, j % right), (i // down, j // right))


@pytest.mark.parametrize("sizes", [(6, 6), (4, 7), (2, 1)])
@torch.no_grad()
def test_windows(sizes):
    x = torch.randn(1, *sizes, 12).double()
    for cls, group in ((MaxViTBlock, near), (MaxViTGrid, apart(*sizes))):
        module = build(cls, window=3)
        wanted = by_loops(module.partition, x[0], group)
        torch.testing.assert_close(module(x).output[0], wanted)
        torch.testing.assert_close(module(x, need_weights=True).output[0], wanted)


@torch.no_grad()
def test_one_window_of_the_whole_map_is_the_same_in_both():
    one, other = build(MaxViTBlock, window=4), build(MaxViTGrid, window=4)
    x = torch.randn(2, 4, 4, 12).double()
    torch.testing.assert_close(one(x).output, other(x).output)


@torch.no_grad()
def test_the_grid_is_spread_over_the_real_part():
    module, x = build(MaxViTGrid, window=3), torch.randn(2, 8, 8, 12).double()
    real = torch.zeros(2, 8, 8, dtype=torch.bool)
    real[0, 1:7, :6] = real[1] = True
    found = module(x, mask=real).output
    torch.testing.assert_close(found[0, 1:7, :6], module(x[:1, 1:7, :6]).output[0])
    torch.testing.assert_close(found[1], module(x[1:]).output[0])


def batch_norm(layer, x):
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=1e-3)


@pytest.mark.parametrize(("stride", "features"), [(1, 12), (2, 12), (2, 24)])
@torch.no_grad()
def test_block(stride, features):
    module, x = build(MaxViT, window=3, stride=stride, features=features), torch.randn(2, 6, 8, 12).double()
    c = module.convolution
    for norm in (c.norm_in, c.norm_up, c.norm_deep):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.normal_()
    z = batch_norm(c.norm_in, x.permute(0, 3, 1, 2))
    z = F.gelu(batch_norm(c.norm_up, F.conv2d(z, c.up.weight[..., None, None])), approximate="tanh")
    z = F.pad(z, (0, 1, 0, 1)) if stride == 2 else F.pad(z, (1, 1, 1, 1))
    z = F.conv2d(z, c.deep.weight, stride=stride, groups=4 * features)
    z = F.gelu(batch_norm(c.norm_deep, z), approximate="tanh").permute(0, 2, 3, 1)
    gate = torch.sigmoid(c.excite(F.silu(c.squeeze(z.mean((1, 2))))))
    kept = x if stride == 1 else F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    y = c.down(z * gate[:, None, None]) + (kept if features == 12 else kept @ c.shortcut.weight.T + c.shortcut.bias)
    for i, partition in enumerate((module.block, module.grid)):
        y = y + partition(F.layer_norm(y, (features,), *module.norms[2 * i].parameters(), 1e-5), None, False)[0]
        z = F.layer_norm(y, (features,), *module.norms[2 * i + 1].parameters(), 1e-5)
        y = y + module.mlps[i].down(F.gelu(module.mlps[i].up(z), approximate="tanh"))
    torch.testing.assert_close(module(x).output, y)
    weights = module(x, need_weights=True).weights
    assert (weights is None) == (stride == 2)
    if weights is not None:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 48).double())


@torch.no_grad()
def test_a_halved_map_with_padding_is_the_smaller_map():
    module, x = build(MaxViT, window=2, stride=2), torch.randn(1, 7, 6, 12).double()
    for rows, columns in ((5, 6), (6, 5), (7, 3)):
        real = torch.zeros(1, 7, 6, dtype=torch.bool)
        real[:, :rows, :columns] = True
        wanted = module(x[:, :rows, :columns]).output
        found = module(x, mask=real).output[:, : wanted.shape[1], : wanted.shape[2]]
        torch.testing.assert_close(found, wanted)


def test_statistics_are_of_real_cells():
    module, x = build(MaxViT, window=2).train(), torch.randn(2, 4, 4, 12).double()
    real = torch.ones(2, 4, 4, dtype=torch.bool)
    real[:, 3] = False
    module(torch.where(real[..., None], x, 100.0), mask=real)
    held = module.convolution.norm_in
    cells = x[:, :3].flatten(0, 2)
    torch.testing.assert_close(held.running_mean, 0.1 * cells.mean(0))
    torch.testing.assert_close(held.running_var, 0.9 + 0.1 * cells.var(0))


def test_the_published_model_has_as_many_parameters():
    total, before = 3 * 64 * 9 + 64 + 2 * 64 + 64 * 64 * 9 + 64, 64
    for dim, depth in zip((64, 128, 256, 512), (2, 2, 5, 2), strict=True):
        blocks = [MaxViT(before, dim // 32, stride=2, features=dim), MaxViT(dim, dim // 32)]
        first, later = (sum(p.numel() for p in block.parameters()) for block in blocks)
        total, before = total + first + (depth - 1) * later, dim
    assert total + 2 * 512 + 512 * 512 + 512 + 512 * 1000 + 1000 == 30_916_528  # maxvit_tiny_tf_224


def test_refusals():
    for config in ({"window": 0}, {"stride": 3}, {"features": 13}):
        with pytest.raises(ValueError, match="maxvit"):
            build(MaxViT, **config)
    with pytest.raises(ValueError, match="window=0"):
        build(MaxViTGrid, window=0)
