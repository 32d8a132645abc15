"""Neighborhood attention of two and three axes against a dense mask made pair by pair."""

import itertools

import pytest
import torch

from manyheads.mechanisms.selection.neighborhood import Neighborhood
from manyheads.mechanisms.selection.neighborhood_grid import NeighborhoodGrid


def build(**config):
    torch.manual_seed(0)
    return NeighborhoodGrid(12, 4, **config).double().eval()


def meets(i, j, length, window, dilation, stride, causal):
    if i % dilation != j % dilation:
        return False
    u, w, members = i // dilation, j // dilation, len(range(i % dilation, length, dilation))
    if causal:
        return w <= u and min(u // stride * stride + stride - 1, members - 1) - w < window
    leader = min(u // stride * stride + stride // 2, members - 1)
    begin = max(min(leader - window // 2, members - window), 0)
    return begin <= w < begin + window


def dense(module, x, rules):
    sizes = x.shape[1:-1]
    cells = list(itertools.product(*map(range, sizes)))
    met = torch.tensor([[all(meets(*a) for a in zip(i, j, sizes, *rules, strict=True)) for j in cells] for i in cells])
    layer, flat = module.attention, x.flatten(1, -2)
    q, k, v = (p(flat).unflatten(-1, (4, 3)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = (q @ k.mT / 3**0.5).masked_fill(~met, -torch.inf).softmax(-1)
    return layer.o_proj((weights @ v).transpose(1, 2).flatten(2)).view_as(x), weights


GRIDS = [
    ((7, 9), {"window": 3}),
    ((7, 9), {"window": 3, "dilation": 2}),
    ((5, 8), {"window": [4, 3], "stride": [3, 1], "dilation": [1, 2]}),
    ((6, 5), {"window": 3, "causal_axes": [0]}),
    ((4, 2, 5), {"window": [3, 2, 3], "causal_axes": [0], "stride": [2, 1, 1]}),
    ((5, 4, 3), {"window": 2, "dilation": [2, 1, 1], "stride": 2, "causal_axes": [0, 2]}),
    ((1, 3), {"window": 7, "dilation": 3}),
]


@pytest.mark.parametrize(("sizes", "config"), GRIDS)
@torch.no_grad()
def test_rule(sizes, config):
    module, x = build(**config), torch.randn(2, *sizes, 12).double()
    given = [config.get(name, 1) for name in ("window", "dilation", "stride")]
    rules = [[one] * len(sizes) if isinstance(one, int) else one for one in given]
    wanted, weights = dense(module, x, [*rules, [axis in config.get("causal_axes", ()) for axis in range(len(sizes))]])
    result = module(x, need_weights=True)
    torch.testing.assert_close(result.output, wanted)
    torch.testing.assert_close(result.weights, weights)
    torch.testing.assert_close(module(x).output, wanted)


@torch.no_grad()
def test_a_grid_of_one_row_is_the_sequence():
    module, line = build(window=[5, 5], dilation=[1, 2], bias=False), Neighborhood(12, 4, window=5, dilation=2).double()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(line, name).load_state_dict(getattr(module.attention, name).state_dict())
    x = torch.randn(2, 1, 23, 12).double()
    torch.testing.assert_close(module(x).output[:, 0], line(x[:, 0]).output)


@torch.no_grad()
def test_padding_moves_no_window():
    module, x = build(window=3), torch.randn(3, 8, 8, 12).double()
    real = torch.zeros(3, 8, 8, dtype=torch.bool)
    real[0, 2:7, 1:6] = real[1, :4, :] = True
    found = module(x, mask=real).output
    torch.testing.assert_close(found[0:1, 2:7, 1:6], module(x[0:1, 2:7, 1:6]).output)
    torch.testing.assert_close(found[1:2, :4], module(x[1:2, :4]).output)
    assert not found[2].any()


def test_refusals():
    for config in ({"window": 0}, {"stride": 4, "window": 3}, {"window": [3]}, {"causal_axes": [3]}):
        with pytest.raises(ValueError, match="neighborhood-grid"):
            build(**config)
    with pytest.raises(ValueError, match="2 axes"):
        build(window=[3, 3, 3])(torch.randn(1, 4, 4, 12).double())
    with pytest.raises(ValueError, match="2 axes"):
        build(causal_axes=[2])(torch.randn(1, 4, 4, 12).double())
