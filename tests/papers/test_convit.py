"""Gated positional self attention against loops over pairs, and what it is at the start."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.convit import ConViT


def build(heads=4, **config):
    torch.manual_seed(0)
    return ConViT(3 * heads, heads, **config).double().eval()


@torch.no_grad()
def test_equation():
    module, x = build(bias=True), torch.randn(1, 3, 4, 12).double()
    module.gate.normal_()
    real = torch.ones(1, 3, 4, dtype=torch.bool)
    real[0, 1, 2] = real[0, 2] = False
    layer = module.attention
    for mask in (None, real):
        cells = [(i, j) for i in range(3) for j in range(4) if mask is None or mask[0, i, j]]
        result = module(x, mask=mask, need_weights=True)
        torch.testing.assert_close(module(x, mask=mask).output, result.output)
        for i, j in cells:
            mixed = []
            for h in range(4):
                cut, w = slice(3 * h, 3 * h + 3), module.positions.weight[h]
                q = layer.q_proj(x[0, i, j])[cut]
                what = torch.stack([q @ layer.k_proj(x[0, a, b])[cut] / 3**0.5 for a, b in cells]).softmax(0)
                where = [w[0] * (b - j) + w[1] * (a - i) + w[2] * ((a - i) ** 2 + (b - j) ** 2) for a, b in cells]
                gate = module.gate[h].sigmoid()
                weights = (1 - gate) * what + gate * torch.stack(where).softmax(0)
                values = torch.stack([layer.v_proj(x[0, a, b])[cut] for a, b in cells])
                mixed.append(weights @ values)
                place = [4 * a + b for a, b in cells]
                torch.testing.assert_close(result.weights[0, h, 4 * i + j, place], weights)
            torch.testing.assert_close(result.output[0, i, j], layer.o_proj(torch.cat(mixed)))


@torch.no_grad()
def test_it_begins_as_a_convolution():
    module, x = build(heads=9, locality=50.0), torch.randn(1, 5, 5, 27).double()
    module.gate.fill_(60.0)
    torch.testing.assert_close(module.attention.v_proj.weight, torch.eye(27).double())
    weights = module(x, need_weights=True).weights[0].view(9, 5, 5, 25)
    for row in range(3):
        for column in range(3):
            seen = weights[column + 3 * row, 2, 3].argmax()
            assert divmod(int(seen), 5) == (2 + row - 1, 3 + column - 1)
    assert bool((weights[:, 2, 3].amax(-1) > 0.999).all())


@torch.no_grad()
def test_a_closed_gate_is_plain_attention():
    module, x = build(), torch.randn(2, 3, 4, 12).double()
    module.gate.fill_(-60.0)
    layer = module.attention
    q, k, v = (
        p(x.flatten(1, 2)).unflatten(-1, (4, 3)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    wanted = layer.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x).output.flatten(1, 2), wanted)


def test_even_kernels_and_heads_left_over():
    weight = build(heads=4).positions.weight.float()
    wanted = torch.tensor([[-1.0, -1.0, -1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [1.0, 1.0, -1.0]])
    torch.testing.assert_close(weight.detach(), wanted)
    assert bool((build(heads=6).positions.weight[4:] != -1.0).all())
    torch.testing.assert_close(build().gate.sigmoid(), torch.full((4,), 0.7310585786).double())


@pytest.mark.parametrize("heads", [4])
def test_the_published_model_has_as_many_parameters(heads):
    dim = 192
    layer = sum(p.numel() for p in ConViT(dim, heads).parameters())
    plain = 4 * dim * dim + dim
    around = 4 * dim + 8 * dim * dim + 5 * dim
    total = 10 * layer + 2 * plain + 12 * around + (768 * dim + dim) + 196 * dim + dim + 2 * dim + dim * 1000 + 1000
    assert total == 5_710_512  # convit_tiny
