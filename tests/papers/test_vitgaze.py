"""Interaction features against sums over patches."""

import pytest
import torch

from manyheads.mechanisms.cross.vitgaze import ViTGaze


def build():
    torch.manual_seed(0)
    return ViTGaze(6, 2, layers=2).double()


@torch.no_grad()
def test_equation():
    module, x, maps = build(), torch.randn(2, 5, 6).double(), torch.rand(2, 4, 5, 5).double().softmax(-1)
    head = torch.tensor([[0.0, 1, 1, 0, 0.5], [0, 0, 1, 0, 0]]).double()
    found = module(x, maps=maps, head=head).output
    inside = [1, 2, 4]
    logits = [float(module.conv(x[0, q].relu())) * head[0, q] for q in inside]
    g = torch.stack(logits).softmax(0)
    for layer in range(4):
        wanted = sum(weight * maps[0, layer, q] for weight, q in zip(g, inside, strict=True))
        torch.testing.assert_close(found[0, :, layer], wanted)
    torch.testing.assert_close(found[1], maps[1, :, 2].T)
    torch.testing.assert_close(module.guidance(x, head)[0, inside], g)


@torch.no_grad()
def test_without_a_head_all_patches_count_alike():
    module, x, maps = build(), torch.randn(1, 5, 6).double(), torch.rand(1, 4, 5, 5).double()
    found = module(x, maps=maps, head=torch.zeros(1, 5)).output
    torch.testing.assert_close(found, maps.mean(2).mT)


def test_refusals():
    module, x, maps = build(), torch.randn(1, 5, 6).double(), torch.rand(1, 4, 5, 5)
    for wrong in ({"maps": maps[:, :3]}, {"head": torch.ones(5)}, {"head": torch.ones(1, 5).bool()}):
        with pytest.raises(ValueError, match="vitgaze: "):
            module(x, **{"maps": maps, "head": torch.ones(1, 5), **wrong})
    with pytest.raises(ValueError, match="layers=0"):
        ViTGaze(6, 2, layers=0)
