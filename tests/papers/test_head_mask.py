"""HeadMask: masked heads are those whose part of the output projection is zero; importance by finite differences."""

import pytest
import torch
from torch import nn

from manyheads import create_attention
from manyheads.registry import list_attentions, mechanism_class
from manyheads.testing import Case
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


def masked_share(module, case, head):
    """The gradient of the output by the weights of each head, with one of them masked; None where it cannot be read."""
    with HeadMask(module, count=0) as heads:
        # A block with two attentions has the head twice; the weights are of one of them.
        heads._mask(torch.arange(head, len(heads.kept), module.heads))
        result = module(case.x(5), case.context(5), need_weights=True)
        weights = result.weights
        if weights is None or not weights.requires_grad:
            return None
        (found,) = torch.autograd.grad(result.output.square().sum(), weights, allow_unused=True)
        return None if found is None else found.abs().amax((0, 2, 3))


NORMED_TOGETHER = {"lightning", "transnormerllm"}  # a norm over all heads before W_o: weights reach each other there


@pytest.mark.parametrize("name", list_attentions())
def test_a_mechanism_of_the_registry_loses_the_head_that_is_masked_or_is_refused_by_name(name):
    cls = mechanism_class(name)
    case = Case(cls, sorted(cls.card.patterns)[0])
    module = case.build().train()
    try:
        HeadMask(module, count=0).remove()
    except ValueError as error:
        assert name in str(error)  # noqa: PT017
        return
    share = masked_share(module, case, 1)
    if share is not None and name not in NORMED_TOGETHER:
        assert share[1] == 0
        assert (share[[0, *range(2, len(share))]] > 0).all()


def test_a_width_that_happens_to_fit_is_no_place_for_heads() -> None:
    """DARE reads three parts of dim - side_dim features, here dim in all: they are not its heads."""
    with pytest.raises(ValueError, match="dare"):
        HeadMask(create_attention("dare", 24, 2, side_dim=16), count=1)


@pytest.mark.parametrize("name", ["luong", "dual", "dare", "mega"])
def test_a_linear_that_reads_more_or_less_than_the_heads_is_refused(name):
    cls = mechanism_class(name)
    with pytest.raises(ValueError, match=f"{name} has no linear"):
        HeadMask(Case(cls, sorted(cls.card.patterns)[0]).build(), count=1)


@torch.no_grad()
def test_several_attentions_in_one_mechanism_and_paths_that_are_named():
    module, x, context = create_attention("lxmert", 8, 4).double().train(), *torch.randn(2, 2, 5, 8).double()
    with HeadMask(module, count=0) as heads:
        assert heads.total == 8
        heads._mask(torch.arange(4))  # all heads of the cross attention
        found = module(x, context).output
    module.cross.o_proj.weight.zero_()
    torch.testing.assert_close(found, module(x, context).output)
    with HeadMask(module, count=3, outputs=["own.o_proj"]) as heads:
        assert heads.total == 4
    with HeadMask(create_attention("mla", 8, 4), count=1, outputs=["o_proj"]) as heads:
        assert heads.total == 4


def test_importance_of_a_head_that_is_used_twice_is_of_both_uses_together():
    module, x, y = create_attention("wn-duma", 8, 4).double().train(), *torch.randn(2, 2, 5, 8).double()

    def loss_of():
        return (module(x, y).output - module(x, y).output).sum()  # the two uses cancel out

    with HeadMask(module, count=1) as heads:
        torch.testing.assert_close(heads.most_important(loss_of), torch.zeros(4).double())
