"""Gated parallel attention against loops and torch's own attention layers."""

import math

import pytest
import torch
from torch import nn

from manyheads.mechanisms.cross.theme_transformer import ThemeTransformer

LABELS = [0, 1, 2, 3, 0, 0, 1]
TOLD = {"labels": torch.tensor([LABELS, LABELS])}


def build(**config):
    torch.manual_seed(0)
    return ThemeTransformer(12, 3, **config).double().eval()


def piece():
    torch.manual_seed(1)
    return torch.randn(2, len(LABELS), 12).double()


def torch_attention(heads):
    """torch's layer with the weights of one of ours."""
    layer = nn.MultiheadAttention(12, 3, batch_first=True).double()
    projections = (heads.q_proj, heads.k_proj, heads.v_proj)
    layer.in_proj_weight.data = torch.cat([p.weight for p in projections])
    layer.in_proj_bias.data = torch.cat([p.bias for p in projections])
    layer.out_proj.load_state_dict(heads.o_proj.state_dict())
    return layer


def place(number):
    row = []
    for pair in range(6):
        angle = number / 10000 ** (2 * pair / 12)
        row += [math.sin(angle), math.cos(angle)]
    return torch.tensor(row, dtype=torch.float64)


@pytest.mark.parametrize("exclusive", [True, False])
@torch.no_grad()
def test_equation(exclusive):
    module, x, theme = build(exclusive=exclusive), piece(), torch.randn(2, 4, 12).double()
    own, cross = torch_attention(module.own), torch_attention(module.cross)
    placed = x + torch.stack([place(i) for i in range(7)])
    found = module(x, theme, need_weights=True, **TOLD)
    for i, label in enumerate(LABELS):
        side, weights = cross(x[:, i : i + 1] + place(label), theme, theme, average_attn_weights=False)
        row = torch.zeros(2, 12).double()
        if label > 0:
            row += side[:, 0] / 2
        if label == 0 or not exclusive:
            row += own(placed[:, i : i + 1], placed[:, : i + 1], placed[:, : i + 1])[0][:, 0] / 2
        torch.testing.assert_close(found.output[:, i], row)
        torch.testing.assert_close(found.weights[:, :, i], weights[:, :, 0] / 2 if label else weights[:, :, 0] * 0)


@torch.no_grad()
def test_outside_its_regions_the_theme_is_not_read():
    module, x = build(), piece()
    first, second = (module(x, torch.randn(2, 4, 12).double(), **TOLD).output for _ in range(2))
    outside = torch.tensor(LABELS) == 0
    torch.testing.assert_close(first[:, outside], second[:, outside])
    assert (first - second)[:, ~outside].abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_cross_attention_knows_the_place_in_the_theme_not_in_the_piece():
    module, theme = build(), torch.randn(2, 4, 12).double()
    x = piece()
    x[:, 6] = x[:, 1]  # the same note, both times first of a region
    output = module(x, theme, **TOLD).output
    torch.testing.assert_close(output[:, 6], output[:, 1])


def test_refusals():
    module, x, theme = build(), piece(), torch.randn(2, 4, 12).double()
    with pytest.raises(ValueError, match="theme-transformer: labels go from -1 to 2; want 0 or more"):
        module(x, theme, labels=TOLD["labels"] - 1)
    with pytest.raises(ValueError, match=r"theme-transformer: labels are torch.float64 \[2, 7\]"):
        module(x, theme, labels=TOLD["labels"].double())
