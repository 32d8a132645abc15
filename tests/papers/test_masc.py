"""MASC image by image, with torch's convolution of a masked kernel."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.cross.masc import MASC


def build(**config):
    torch.manual_seed(0)
    module = MASC(6, 1, **config).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def one_image(module, x, text, moves):
    """x [height, width, 6], text [m, 6]"""
    maps, control = [x.permute(2, 0, 1)], module.control
    for step in range(module.steps):
        message = sum(w * h for w, h in zip(torch.stack([control @ h for h in text]).softmax(0), text, strict=True))
        control = module.update(torch.cat([control, message]))
        kernel = module.conv_weight * module.action(message).softmax(0).view(3, 3)
        moved = F.conv2d(maps[-1][None], kernel, padding=1)[0]
        maps.append(moved if step < moves else torch.zeros_like(moved))
    gates = module.gates.sigmoid()
    return sum(gate[:, None, None] * one for gate, one in zip(gates, maps, strict=True)).permute(1, 2, 0)


@torch.no_grad()
def test_equation():
    module, x, text = build(), torch.randn(3, 4, 5, 6).double(), torch.randn(3, 7, 6).double()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    moves = torch.tensor([3, 1, 0])
    found = module(x, text, mask=mask, moves=moves).output
    for b, length in enumerate((7, 4, 7)):
        torch.testing.assert_close(found[b], one_image(module, x[b], text[b, :length], int(moves[b])))
    torch.testing.assert_close(module(x, text).output[0], one_image(module, x[0], text[0], 3))


@torch.no_grad()
def test_a_mask_on_one_neighbour_and_a_kernel_of_one_shift_the_map():
    module, x, text = build(steps=1), torch.randn(1, 4, 5, 6).double(), torch.randn(1, 2, 6).double()
    module.conv_weight.copy_(torch.eye(6)[:, :, None, None].expand(-1, -1, 3, 3))
    module.action.weight.zero_()
    module.action.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 100.0, 0, 0, 0]))  # the neighbour on the right
    module.gates.copy_(torch.tensor([[-100.0], [100.0]]).expand(2, 6))
    torch.testing.assert_close(module(x, text).output[:, :, :-1], x[:, :, 1:])


def test_refusals():
    with pytest.raises(ValueError, match="masc: steps=0"):
        build(steps=0)
    x, text = torch.randn(2, 4, 5, 6).double(), torch.randn(2, 7, 6).double()
    for wrong in (torch.ones(2), torch.ones(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="masc: moves"):
            build()(x, text, moves=wrong)
