"""Outlook attention against PyTorch's unfold and fold, and against loops."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.volo import Volo


def build(**config):
    torch.manual_seed(0)
    return Volo(12, 4, **config).double().eval()


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 3), (1, 1)])
@pytest.mark.parametrize("sizes", [(6, 6), (5, 7), (1, 1)])
@torch.no_grad()
def test_unfolded_and_folded(kernel, stride, sizes):
    module, x = build(kernel=kernel, stride=stride), torch.randn(2, *sizes, 12).double()
    pad, area = kernel // 2, kernel**2
    v = F.unfold(module.v_proj(x).permute(0, 3, 1, 2), kernel, padding=pad, stride=stride)
    v = v.view(2, 4, 3, area, -1).permute(0, 1, 4, 3, 2)
    means = F.avg_pool2d(x.permute(0, 3, 1, 2), stride, stride, ceil_mode=True).permute(0, 2, 3, 1)
    scores = module.attention(means).reshape(2, -1, 4, area, area).transpose(1, 2)
    mixed = (scores / 3**0.5).softmax(-1) @ v
    folded = F.fold(mixed.permute(0, 1, 4, 3, 2).reshape(2, 12 * area, -1), sizes, kernel, padding=pad, stride=stride)
    wanted = module.o_proj(folded.permute(0, 2, 3, 1))
    torch.testing.assert_close(module(x).output, wanted)
    weights = module(x, need_weights=True).weights
    values = module.v_proj(x).flatten(1, 2).unflatten(-1, (4, 3)).transpose(1, 2)
    torch.testing.assert_close(module.o_proj((weights @ values).transpose(1, 2).flatten(2)).view_as(x), wanted)


@torch.no_grad()
def test_a_cell_says_how_those_around_it_are_mixed():
    module, x = build(), torch.randn(1, 4, 4, 12).double()
    changed = x.clone()
    changed[0, 0, 0] += 1.0
    moved = (module(changed).output - module(x).output).abs().sum(-1)[0] > 1e-9
    assert bool(moved[:3, :3].all())
    assert not moved[3].any()
    assert not moved[:, 3].any()


@pytest.mark.parametrize("stride", [1, 2, 3])
@torch.no_grad()
def test_padding_is_outside_of_the_map(stride):
    module, x = build(stride=stride, bias=True), torch.randn(1, 7, 6, 12).double()
    for rows, columns in ((5, 6), (6, 5), (7, 2), (1, 1)):
        real = torch.zeros(1, 7, 6, dtype=torch.bool)
        real[:, :rows, :columns] = True
        filled = x.masked_fill(~real[..., None], 9.0)
        small = module(x[:, :rows, :columns], need_weights=True)
        result = module(filled, mask=real, need_weights=True)
        torch.testing.assert_close(result.output[:, :rows, :columns], small.output)
        cells = result.weights.view(1, 4, 7, 6, 7, 6)[:, :, :rows, :columns, :rows, :columns]
        torch.testing.assert_close(cells.flatten(4).flatten(2, 3), small.weights)


def test_parameters():
    module = Volo(192, 6)
    assert sum(p.numel() for p in module.parameters()) == 192 * 192 + (192 * 486 + 486) + (192 * 192 + 192)


def test_refusals():
    for config in ({"kernel": 2}, {"kernel": 3, "stride": 4}):
        with pytest.raises(ValueError, match="odd kernel"):
            build(**config)


@torch.no_grad()
def test_begins_no_louder_than_what_it_reads():
    """Else what cells have in common, summed over kernel^2 windows, drowns the cells themselves."""
    torch.manual_seed(0)
    module, x = Volo(64, 4).eval(), torch.randn(64) + 0.4 * torch.randn(2, 8, 8, 64)
    assert module(x).output.square().mean() < x.square().mean() / 4
