"""Object-guided attention by loops over cells."""

import torch

from manyheads.mechanisms.grid.object_guided import ObjectGuided


def build(**config):
    torch.manual_seed(0)
    module = ObjectGuided(32, **config).double().eval()
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    return module


def by_cells(module, x, o):
    """x [h, w, c], o [e]"""
    height, width, _ = x.shape
    hidden = module.wide(torch.cat([o, sum(x.flatten(0, 1)) / (height * width)])).clamp(min=0)
    r = x * torch.sigmoid(module.narrow(hidden))
    y, norm = x.clone(), module.norm
    for i in range(height):
        for j in range(width):
            total = torch.zeros(1).double()
            for di in range(3):
                for dj in range(3):
                    row, column = i + di - 1, j + dj - 1
                    if 0 <= row < height and 0 <= column < width:
                        means = torch.stack([o.mean(), r[row, column].mean()])
                        total += module.conv.weight[0, :, di, dj] @ means
            total = (total - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            y[i, j] += r[i, j] * torch.sigmoid(total)
    return y


@torch.no_grad()
def test_equation():
    module, x, o = build(source_dim=6), torch.randn(2, 3, 4, 32).double(), torch.randn(2, 1, 6).double()
    torch.testing.assert_close(module(x, o).output[1], by_cells(module, x[1], o[1, 0]))


@torch.no_grad()
def test_one_picture_alone():
    module, x, o = build(), torch.randn(1, 2, 2, 32).double(), torch.randn(1, 1, 32).double()
    assert module(x, o).output.shape == (1, 2, 2, 32)


@torch.no_grad()
def test_of_several_objects_the_mean_of_the_real_ones():
    module, x, o = build(), torch.randn(1, 2, 3, 32).double(), torch.randn(1, 3, 32).double()
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(module(x, o, mask=mask).output, module(x, o[:, :2].mean(1, keepdim=True)).output)


def test_as_many_parameters_as_released():
    # mlp_3 with an embedding of 300 and 768 features, conv_3 and its norm.
    wanted = 1068 * 348 + 348 + 348 * 768 + 768 + 18 + 2
    assert sum(p.numel() for p in ObjectGuided(768, source_dim=300).parameters()) == wanted
