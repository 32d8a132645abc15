"""What the recipes of models that draw are made of: Muon beside PyTorch's, and a UNet whose attention knows places."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from manyheads.models import DiffusionUNet, UNetConfig
from manyheads.models.unet import Attending

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_is_pytorchs_but_for_its_precision(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    muon = importlib.import_module("drawing").Muon
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, wanted = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    beside = torch.nn.Parameter(torch.randn(shape))  # of the same shape, so that both are moved at once
    own = muon([ours, beside], lr=0.1)
    theirs = torch.optim.Muon([wanted], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad, beside.grad = torch.randn(shape), torch.randn(shape)
        wanted.grad = ours.grad.clone()
        own.step()
        theirs.step()
    step, other = ours.detach() - start, wanted.detach() - start
    assert float((step - other).norm() / other.norm()) < 0.02


def test_attention_of_a_unet_tells_places_apart() -> None:
    """The same features everywhere: what a block adds differs from place to place, by its places alone."""
    config = UNetConfig(image_size=8, widths=[8, 16], attention_sides=[4], num_attention_heads=2)
    model = DiffusionUNet(config)
    block = next(module for module in model.modules() if isinstance(module, Attending))
    torch.manual_seed(1)
    for linear in (block.self_attention.o_proj, block.cross_attention.o_proj, block.down):
        torch.nn.init.normal_(linear.weight)
    alike, words = torch.ones(1, 16, 4, 4), torch.randn(1, 3, 16)
    with torch.no_grad():
        out = block(alike, words, torch.ones(1, 3, dtype=torch.bool))
        added = (out - alike).flatten(2)[0] - block.places.T
        assert float(added.std(1).max()) > 1e-2
        block.places.zero_()
        out = block(alike, words, torch.ones(1, 3, dtype=torch.bool))
    assert_close(out, out[:, :, :1, :1].expand_as(out))
