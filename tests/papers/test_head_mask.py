"""HeadMask: masked heads are those whose part of the output projection is zero; importance by finite differences."""

import pytest
import torch
from torch import nn

from manyheads import create_attention
from manyheads.training import HeadMask


class TwoLayers(nn.Module):
    def __init__(self, names=("softmax", "gqa")):
        super().__init__()
        torch.manual_seed(0)
        config = {"gqa": {"kv_heads": 2}}
        self.layers = nn.ModuleList(create_attention(name, 8, 4, **config.get(name, {})) for name in names)
        self.double().train()

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).output
        return x


def without(model, x, gone):
    """The model with the columns of the gone heads struck out of the output projections, by hand."""
    for index, layer in enumerate(model.layers):
        weight = layer.o_proj.weight.clone()
        for h in range(4):
            if index * 4 + h in gone:
                weight[:, 2 * h : 2 * h + 2] = 0
        before = layer.o_proj.weight
        layer.o_proj.weight = nn.Parameter(weight)
        y = layer(x).output
        layer.o_proj.weight = before
        x = x + y
    return x


@torch.no_grad()
def test_masked_heads_are_gone_and_not_made_up_for():
    model, x = TwoLayers(), torch.randn(2, 5, 8).double()
    full, seen = model(x), set()
    with HeadMask(model, count=3) as heads:
        for _ in range(10):
            heads.draw()
            found = model(x)
            gone = tuple((~heads.kept).nonzero()[:, 0].tolist())
            assert len(gone) == 3
            seen.add(gone)
            heads.kept[:] = True
            torch.testing.assert_close(model(x), full)
            torch.testing.assert_close(found, without(model, x, gone))
    assert len(seen) > 5
    torch.testing.assert_close(model(x), full)  # the hooks are gone


def test_importance_is_the_summed_size_of_the_derivative_by_each_gate():
    model, x = TwoLayers(), torch.randn(3, 5, 8).double()

    def loss_of(rows=slice(None)):
        return (model(x[rows]) ** 3).sum()

    with HeadMask(model, count=2) as heads:
        found = heads.most_important(loss_of)
        masked = set((~heads.kept).nonzero()[:, 0].tolist())
    assert all(p.grad is None for p in model.parameters())
    wanted, step = torch.zeros(8).double(), 1e-5
    with torch.no_grad():
        for head in range(8):
            weight = model.layers[head // 4].o_proj.weight[:, head % 4 * 2 : head % 4 * 2 + 2]
            kept = weight.clone()
            for row in range(3):
                values = []
                for sign in (1, -1):
                    weight.copy_(kept * (1 + sign * step))
                    values.append(loss_of(slice(row, row + 1)))
                wanted[head] += (values[0] - values[1]).abs() / (2 * step)
            weight.copy_(kept)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert masked == set(wanted.topk(2).indices.tolist())


def test_a_masked_head_gets_no_gradient():
    model, x = TwoLayers(("softmax",)), torch.randn(2, 5, 8).double()
    with HeadMask(model, count=1) as heads:
        heads._mask(torch.tensor([2]))
        model(x).pow(2).sum().backward()
    gradient = model.layers[0].v_proj.weight.grad.unflatten(0, (4, 2)).abs().sum((1, 2))
    assert gradient[2] == 0
    assert (gradient[[0, 1, 3]] > 0).all()


@torch.no_grad()
def test_eval_is_left_alone():
    model, x = TwoLayers(), torch.randn(2, 5, 8).double()
    full = model(x)
    with HeadMask(model, count=7) as heads:
        heads.draw()
        torch.testing.assert_close(model.eval()(x), full)
        with pytest.raises(ValueError, match="train"):
            heads.most_important(lambda: model(x).sum())


def test_refusals():
    with pytest.raises(ValueError, match="count=8"):
        HeadMask(TwoLayers(), count=8)
    with pytest.raises(ValueError, match="efficient-probing"):
        HeadMask(create_attention("efficient-probing", 8, 2), count=1)
