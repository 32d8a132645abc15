"""HaloNet against loops over blocks and places."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.halonet import HaloNet


def build(**config):
    torch.manual_seed(0)
    return HaloNet(12, 4, **config).double().eval()


def by_loops(module, x, real):
    """x [height, width, 12], one place after the other."""
    height, width, _ = x.shape
    b, reach, step = module.block, module.block + 2 * module.halo, module.stride
    y = torch.zeros_like(x[::step, ::step])
    for i in range(0, height, step):
        for j in range(0, width, step):
            top, left = i // b * b - module.halo, j // b * b - module.halo
            scores, values = [], []
            q = module.q_proj(x[i, j]).view(4, 3)
            for row in range(top, top + reach):
                for column in range(left, left + reach):
                    k = v = torch.zeros(4, 3).double()
                    if 0 <= row < height and 0 <= column < width and real[row, column]:
                        k, v = (layer(x[row, column]).view(4, 3) for layer in (module.k_proj, module.v_proj))
                    # An offset of a cell is counted from its place in the block to a place of the block with its halo.
                    down = row - top - (i - i // b * b) // step + reach - 1
                    right = column - left - (j - j // b * b) // step + reach - 1
                    position = module.positions.height[down] + module.positions.width[right]
                    scores.append((q * k).sum(-1) / 3**0.5 + q @ position)
                    values.append(v)
            weights = torch.stack(scores).softmax(0)
            y[i // step, j // step] = (weights[..., None] * torch.stack(values)).sum(0).flatten()
    return y


@pytest.mark.parametrize(("block", "halo"), [(2, 1), (3, 2), (4, 0), (9, 1)])
@torch.no_grad()
def test_equation(block, halo):
    module, x = build(block=block, halo=halo, bias=True), torch.randn(2, 5, 6, 12).double()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1], torch.ones(5, 6, dtype=torch.bool)))
    real = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    found, wanted = module(x, mask=real).output[0], by_loops(module, x[0], real[0])
    torch.testing.assert_close(found[real[0]], wanted[real[0]])


@pytest.mark.parametrize(("block", "halo", "stride"), [(2, 1, 2), (4, 1, 2), (3, 0, 3)])
@torch.no_grad()
def test_every_so_manieth_cell_asks(block, halo, stride):
    module, x = build(block=block, halo=halo, stride=stride), torch.randn(1, 5, 6, 12).double()
    real = torch.ones(1, 5, 6, dtype=torch.bool)
    real[:, 4:] = False
    found, wanted = module(x, mask=real).output[0], by_loops(module, x[0], real[0])
    small = module(x[:, :4]).output[0]
    assert found.shape[:2] == module.result_size(5, 6) == (-(-5 // stride), -(-6 // stride))
    torch.testing.assert_close(found[: len(small)], wanted[: len(small)])
    torch.testing.assert_close(small, wanted[: len(small)])
    weights = module(x, need_weights=True).weights
    assert weights.shape[2:] == (found[..., 0].numel(), 30)
    v = module.v_proj(x).flatten(1, 2).unflatten(-1, (4, 3)).transpose(1, 2)
    torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2)[0], module(x).output[0].flatten(0, 1))


@torch.no_grad()
def test_one_block_without_positions_is_plain_attention():
    module, x = build(block=4, halo=0), torch.randn(1, 4, 4, 12).double()
    for table in module.positions.parameters():
        table.zero_()
    q, k, v = (
        layer(x).flatten(1, 2).unflatten(-1, (4, 3)).transpose(1, 2)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x).output.flatten(1, 2), wanted)


@torch.no_grad()
def test_weights_times_values():
    module, x = build(block=2, halo=1), torch.randn(2, 6, 6, 12).double()
    result = module(x, need_weights=True)
    v = module.v_proj(x).flatten(1, 2).unflatten(-1, (4, 3)).transpose(1, 2)
    torch.testing.assert_close((result.weights @ v).transpose(1, 2).flatten(2), result.output.flatten(1, 2))
    total = result.weights.sum(-1).unflatten(-1, (6, 6))
    torch.testing.assert_close(total[:, :, 2:4, 2:4], torch.ones(2, 4, 2, 2).double())
    assert bool((total[:, :, 0] < 1).all())
    assert build().q_proj.bias is None


def test_refusals():
    with pytest.raises(ValueError, match=r"halo=-1"):
        build(halo=-1)
    with pytest.raises(ValueError, match=r"stride=3 in blocks of 8"):
        build(stride=3)
